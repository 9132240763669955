"""The worker: a function from jobs to messages. It knows nothing of Optuna or SQL.

As a process it reads jobs from standard input and writes messages to standard output, both as
lines of JSON; what libraries print goes to its log (standard error).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tlauto import pulse
from tlauto.contracts import EpochResult, TrialDone, TrialFailed, TrialSpec, trains_backbone
from tlauto.data import Dataset
from tlauto.errors import OutOfMemory, TlautoError, TrialError
from tlauto.memory import held_bytes
from tlauto.plugins import registry
from tlauto.pool.beats import beat_every
from tlauto.pool.growth import Growth, growth_here
from tlauto.pool.protocol import (
    Answer,
    Beat,
    BundleDone,
    Grown,
    JobFailed,
    Message,
    Note,
    Preflight,
    Ready,
    RunTogether,
    RunTrial,
    StepTried,
    Stop,
    TogetherDone,
    TryStep,
    Used,
    WriteBundle,
    decode,
    encode,
)

AHEAD = ("tlauto.training.fit", "tlauto.results.bundle")
"""What trials and bundles need, imported while there is no job: before the first one, or after the backbones
were checked, while the coordinator makes the study."""

Send = Callable[[Message], None]
Receive = Callable[[], Message]


def serve(receive: Receive, send: Send, device: str, *, rest: Callable[[], None] = lambda: None) -> None:
    """Do jobs until told to stop; `rest` is called before each is waited for."""
    growth = growth_here()
    send(Ready(os.getpid()))
    while True:
        rest()
        job = receive()
        if isinstance(job, Stop):
            return
        try:
            end = _do(job, receive, send, device)
        except TlautoError as error:
            end = JobFailed(str(error), traceback.format_exc())
        except Exception as error:  # noqa: BLE001 whatever a plugin or library raises is this job's failure
            end = JobFailed(_sentence(error), traceback.format_exc())
        _settle_memory(job, growth, send)
        send(end)


def _do(job: Message, receive: Receive, send: Send, device: str) -> Message:
    if isinstance(job, RunTrial):
        return _run_trial(job.spec, receive, send, device)
    if isinstance(job, RunTogether):
        return _run_together(job.specs, send, device)
    if isinstance(job, WriteBundle):
        return _write_bundle(job, device)
    if isinstance(job, TryStep):
        return _try_step(job, device)
    assert isinstance(job, Preflight)
    from tlauto.preflight import check_backbones

    return check_backbones(job, registry(), note=lambda text: send(Note(text)))


def _run_trial(spec: TrialSpec, receive: Receive, send: Send, device: str) -> TrialDone | TrialFailed:
    """Run a trial and return how it ended; every failure is a message, never an exception."""
    from tlauto.training import footprint
    from tlauto.training.fit import run_trial

    def on_epoch(result: EpochResult) -> bool:
        send(result)
        answer = receive()
        return isinstance(answer, Answer) and answer.go_on

    try:
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        dataset = _dataset(spec.dataset)
        footprint.begin(device)
        done = run_trial(spec, registry(), dataset, device=device, on_epoch=on_epoch)
        send(Used(footprint.peak_bytes(device), footprint.total_bytes(device)))
        return done
    except TrialError as error:
        asked = error.bytes if isinstance(error, OutOfMemory) else None
        return TrialFailed(spec.number, error.kind, str(error), traceback.format_exc(), asked)
    except TlautoError as error:
        return TrialFailed(spec.number, TrialError.kind, str(error), traceback.format_exc())
    except Exception as error:  # noqa: BLE001 a plugin's model may raise anything; the search goes on
        kind = OutOfMemory.kind if isinstance(error, MemoryError) else TrialError.kind
        return TrialFailed(spec.number, kind, _sentence(error), traceback.format_exc())


def _run_together(specs: Sequence[TrialSpec], send: Send, device: str) -> TogetherDone:
    from tlauto.training import footprint
    from tlauto.training.fit import run_together

    for spec in specs:
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
    footprint.begin(device)
    ends = run_together(specs, registry(), _dataset(specs[0].dataset), device=device)
    send(Used(footprint.peak_bytes(device), footprint.total_bytes(device)))
    return TogetherDone(tuple(done for _, done in ends), tuple(epoch for epoch, _ in ends))


def _try_step(job: TryStep, device: str) -> StepTried:
    from tlauto.training.footprint import total_bytes, try_step

    dataset = _dataset(job.spec.dataset)
    tried = try_step(job.spec, registry(), dataset, device=device, at_once=job.at_once, most=job.most)
    return StepTried(tried.at_once, tried.bytes, total_bytes(device))


def _settle_memory(job: Message, growth: Growth, send: Send) -> None:
    """Give memory back where it pays, and say when trials leave more and more of it behind."""
    gives_back = _used_much_memory(job) or growth.is_early
    _give_back_memory(collects=gives_back)
    held = held_bytes() if isinstance(job, (RunTrial, RunTogether)) else None
    if held is None:
        return
    if growth.is_too_much(held) and not gives_back:
        _give_back_memory()
        held = held_bytes() or held
    growth.note(held)
    if growth.is_too_much(held):
        send(Grown(held, growth.level))


def _used_much_memory(job: Message) -> bool:
    """Not a trial on cached features, which takes less time than collecting garbage after it would."""
    if isinstance(job, RunTogether):
        return False
    if not isinstance(job, RunTrial):
        return True
    is_known = job.spec.strategy in registry().names("freeze_strategies")
    return is_known and trains_backbone(registry().strategy(job.spec.strategy))


def _give_back_memory(*, collects: bool = True) -> None:
    """Return what the job freed: a GPU's to the workers beside this one, and main memory to the system.

    Workers keep freed blocks while a job runs, which is what makes it fast (`devices.GLIBC_TUNABLES`);
    without this the next job's blocks come on top: 8.9 GB after 16 trials that need 2 to 5 GB each.

    Args:
        collects: garbage first, and returns main memory too.
    """
    if collects:
        gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()  # does nothing where CUDA was not used
    if collects:
        with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


_datasets: dict[str, tuple[float, Dataset]] = {}


def _dataset(path: str) -> Dataset:
    """The dataset of a file, kept between trials while the file does not change."""
    changed = Path(path).stat().st_mtime
    if path not in _datasets or _datasets[path][0] != changed:
        _datasets[path] = (changed, Dataset.from_json(Path(path).read_text(encoding="utf-8")))
    return _datasets[path][1]


def _write_bundle(job: WriteBundle, device: str) -> BundleDone:
    from tlauto.results.bundle import save_bundle
    from tlauto.training.joined import restore_parts

    dataset = _dataset(job.spec.dataset)
    checkpoint = Path(job.spec.folder) / job.done.checkpoint
    classifier, *others = restore_parts(job.spec, registry(), dataset, checkpoint, device)
    save_bundle(
        Path(job.folder),
        classifier=classifier,
        spec=job.spec,
        dataset=dataset,
        info=job.info,
        done=job.done,
        evaluated_on=job.evaluated_on,
        comparison=job.comparison,
        members=[(Path(folder), weight) for folder, weight in job.members],
        weight=job.weight,
        alone=job.alone,
        parts=list(zip(others, job.beside, strict=True)),
    )
    return BundleDone(job.folder, job.spec.number)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def main() -> None:
    """Entry of the worker process: `python -m tlauto.worker DEVICE`."""
    device = sys.argv[1]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not reach the coordinator
    jobs: queue.SimpleQueue[Message] = queue.SimpleQueue()
    one_at_a_time = threading.Lock()

    def send(message: Message) -> None:
        line = encode(message) + "\n"
        with one_at_a_time:
            out.write(line)
            out.flush()

    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    threading.Thread(target=_beat, args=(send,), daemon=True).start()  # importing torch takes a while
    _use_threads()
    ahead = list(AHEAD)

    def import_ahead() -> None:
        if not ahead:
            return
        while ahead and jobs.empty():
            with contextlib.suppress(Exception):  # who needs it will meet that again, and tell
                importlib.import_module(ahead.pop(0))
        if not ahead:
            # Libraries stay: who collects garbage later need not look at them, which takes .2 s each time.
            gc.collect()
            gc.freeze()

    serve(jobs.get, send, device, rest=import_ahead)
    # Libraries may have left threads behind; nothing is unsaved here.
    out.close()
    os._exit(0)


def _read_jobs(jobs: queue.SimpleQueue[Message]) -> None:
    for line in sys.stdin:
        jobs.put(decode(line))
    # End of input: the coordinator is gone, whatever we are doing is for nobody.
    os._exit(0)


def _beat(send: Send) -> None:
    """Give signs of life as long as the process lives."""
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more: we are gone in a moment
        while True:
            time.sleep(beat_every())
            send(Beat(pulse.reading()))


def _use_threads() -> None:
    """Arithmetic threads of this worker, as its slot says."""
    threads = int(os.environ.get("TLAUTO_THREADS", "0"))
    if threads:
        import torch

        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
