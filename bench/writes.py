"""Kill a search after each of its writes to the database, and look whether anything is lost.

    python bench/writes.py
    python bench/writes.py --every 10

`chaos.py` strikes at random; this leaves no gap between two writes out. The coordinator, the study and
the SQLite file are the real ones, the workers are simulated and take no time, and processes are forked
from one that has imported everything, so that a kill costs about a second. A search is killed right
before its n-th commit, resumed to its end, and its database judged as in `chaos.py`; with `--twice` the
resumed one is killed as well, at a random write. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from ledger import DOUBLE, LOST, MISSED, Fault, Ledger, changes, faults
from searches import write_images

import tlauto.prepare
from tlauto.config import SearchConfig
from tlauto.contracts import BackboneInfo, EpochResult, TrialDone, TrialSpec, WeightsStatus, trains_backbone
from tlauto.coordinator import run
from tlauto.data import Dataset
from tlauto.executors import Wanted
from tlauto.plugins import registry
from tlauto.pool.base import Event
from tlauto.pool.protocol import (
    Answer,
    BundleDone,
    Candidate,
    Message,
    Preflight,
    PreflightDone,
    RunTrial,
    WriteBundle,
)

BACKBONES = ("timm:one", "timm:two")
TRIALS = 10
FIRST = {
    "probe": [(name, "feature_extraction", "linear") for name in BACKBONES],
    "default": [(BACKBONES[0], "partial", "linear")],
}
FIGURES = (LOST, DOUBLE, MISSED)


class Light:
    """Where the light workers run."""

    name = "light"

    def open(self, _wanted: Wanted) -> LightPool:
        """Two of them."""
        return LightPool()


class LightPool:
    """Workers that answer at once, with scores that depend on the trial's parameters and seed alone."""

    device = "cpu"

    def __init__(self) -> None:
        self.slots = ("light:0", "light:1")
        self._said: deque[Event] = deque()
        self._running: dict[str, tuple[TrialSpec, int]] = {}

    def send(self, slot: str, message: Message) -> None:
        """Do a job, as far as it goes without an answer."""
        match message:
            case Preflight():
                known = [BackboneInfo(id, accuracy=0.8 - i / 10) for i, id in enumerate(BACKBONES)]
                found = tuple(Candidate(info, WeightsStatus("at_hand", "here")) for info in known)
                self._say(slot, PreflightDone(found))
            case RunTrial(spec):
                self._running[slot] = spec, 0
                self._epoch(slot)
            case Answer(go_on):
                spec, epoch = self._running[slot]
                if epoch < _epochs(spec) and go_on:
                    self._epoch(slot)
                else:
                    self._end(slot, is_pruned=not go_on)
            case WriteBundle():
                _write_bundle(Path(message.folder), message.evaluated_on)
                self._say(slot, BundleDone(message.folder, message.spec.number))

    def wait(self, timeout_s: float) -> list[Event]:
        """What was said first and not yet heard."""
        return [self._said.popleft()] if self._said else []

    def warm_up(self, slots: Sequence[str]) -> None:
        """Nothing to start."""

    def kill(self, slot: str) -> str:
        """Forget what a slot does."""
        self._running.pop(slot, None)
        self._said = deque(event for event in self._said if event.slot != slot)
        return ""

    def close(self, *, grace_s: float = 1.0) -> None:
        """Nothing to end."""

    def _say(self, slot: str, message: Message) -> None:
        self._said.append(Event(slot, message))

    def _epoch(self, slot: str) -> None:
        spec, epoch = self._running[slot]
        self._running[slot] = spec, epoch + 1
        score = _score(spec, epoch + 1)
        self._say(slot, EpochResult(spec.number, epoch + 1, score, 1.0, 1 - score, 0.01))

    def _end(self, slot: str, *, is_pruned: bool) -> None:
        spec, epoch = self._running.pop(slot)
        score, folder = _score(spec, epoch), Path(spec.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.safetensors").touch()
        images = len(Dataset.from_json(Path(spec.dataset).read_text()).part(spec.evaluate_on))
        answers = np.tile([0.5, 0.5], (images, 1))
        np.savez(folder / "predictions.npz", targets=np.zeros(images, dtype=int), predictions=answers)
        metrics = {"accuracy": {"value": score, "low": score, "high": score}}
        done = TrialDone(
            number=spec.number, score=score, metrics=metrics, val_loss=1 - score, best_epoch=epoch,
            epochs=epoch, seconds=0.01, checkpoint="c", is_pruned=is_pruned,
            held_out=score if epoch == 1 else None,
        )  # fmt: skip
        self._say(slot, done)


def _epochs(spec: TrialSpec) -> int:
    return spec.epochs if trains_backbone(registry().strategy(spec.strategy)) else 1


def _score(spec: TrialSpec, epoch: int) -> float:
    point = json.dumps([spec.backbone, spec.strategy, spec.head, dict(spec.params)], sort_keys=True)
    return 0.6 + random.Random(point).uniform(0, 0.3) + epoch / 100


def _write_bundle(folder: Path, evaluated_on: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"")
    about = {"sha256": hashlib.sha256(b"").hexdigest(), "evaluated_on": evaluated_on}
    (folder / "tlauto.json").write_text(json.dumps(about))


def search(folder: Path, images: Path, *, killed_at: int | None) -> tuple[int, int]:
    """Search in a process of its own that is killed right before a commit, counted from 1.

    Returns: how it ended, negative for a signal, and how many writes it committed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _search(folder, images, killed_at, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        written = len(pipe.read())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written


def _search(folder: Path, images: Path, killed_at: int | None, writing: int) -> None:
    """In the child: search, with a byte to the pipe for each commit."""
    changed: dict[int, int] = {}
    written = 0

    @sa.event.listens_for(sa.engine.Engine, "commit")
    def commit(connection: sa.Connection) -> None:
        nonlocal written
        file = connection.connection.dbapi_connection
        assert file is not None
        if changed.get(id(file), 0) == file.total_changes:
            return  # it has only read
        changed[id(file)] = file.total_changes
        written += 1
        if written == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(writing, b".")

    code = 1
    try:
        config = SearchConfig(
            data=str(images), out=str(folder / "runs"), study="study", trials=TRIALS, devices="cpu",
            preset="fast", pretrained=False, offline=True, cold=True, ensemble=1, backbones=BACKBONES,
            strategies=("feature_extraction", "partial"), heads=("linear", "mlp"),
        )  # fmt: skip
        run(config)
        code = 0
    except BaseException:  # noqa: BLE001 whatever it is, the parent is told
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    args = parse()
    tlauto.prepare.choose_executor = lambda _config, *, out, cache: (Light(), Wanted(out, cache))
    totals, killed = Counter[str](), 0
    base = Path(tempfile.mkdtemp(prefix="tlauto-writes-"))
    os.environ["TLAUTO_CACHE"] = str(base / "cache")
    images = write_images(base / "images", per_class=10, size=24)
    code, writes = search(base / "whole", images, killed_at=None)
    if code:
        sys.exit(f"a search that nobody kills ended with {code}")
    chance = random.Random(args.seed)
    for at in range(args.first, writes + 1, args.every):
        folder = base / f"at-{at}"
        again = chance.randint(1, writes) if args.twice else None
        found = judge(folder, images, [at, *([again] if again else [])])
        killed += 1
        totals.update(name for name, _ in found)
        if found:
            print(f"{at:>4} of {writes}" + (f", then {again}" if again else ""), flush=True)
            for name, what in found:
                print(f"      {name}: {what}", flush=True)
        else:
            shutil.rmtree(folder)
    shutil.rmtree(base) if not totals else print(f"kept in {base}", flush=True)
    print(json.dumps({**{name: totals[name] for name in FIGURES}, "killed": killed, "writes": writes}))


def judge(folder: Path, images: Path, kills: list[int]) -> list[Fault]:
    """Kill a search and go on with it. Returns: what is wrong then."""
    ledger, found, seen = Ledger(str(folder / "runs" / "tlauto.db"), "study"), [], {}  # type: ignore[var-annotated]
    for at in kills:
        search(folder, images, killed_at=at)
        now = ledger.trials()
        found += changes(seen, now)
        seen = now
    code, _ = search(folder, images, killed_at=None)
    now = ledger.trials()
    found += changes(seen, now) + faults(now, total=TRIALS, first=FIRST)
    if code or ledger.search() != ("finished", None) or ledger.models()[0][1] != "test":
        found.append((MISSED, f"the resumed search ended with {code}: {ledger.search()}, {ledger.models()}"))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=1, help="write that the first kill is before")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="kill at every N-th write only")
    parser.add_argument("--twice", action="store_true", help="kill the resumed search too")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
