"""Images a second of a frozen backbone: the engines of tlauto side by side, and plain PyTorch.

    python bench/forward.py --data DIR --backbone efficientnet-lite:lite0
    python bench/forward.py --quick          # one dataset of the folder TLAUTO_BENCH_DATA, under 5 minutes

Two processes hold the engines: one starts as tlauto's workers do (allocator, threads), the other with
the variables of this shell and runs only eager PyTorch in NCHW, as a plain script would. They take turns,
one pass over the same real images each, so that other work on the machine slows all of them; images/s
are medians of the passes. Seconds to prepare are those of converting and compiling; differences are from
eager PyTorch, as a part of the largest feature.
The last line of standard output is one JSON object. `engine_ratio`: the engine that tlauto chooses for
--of images against the best one. `nchw_ratio`: the same against the plain script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from probe_script import cores
from search_vs_probe import default_data

from tlauto.devices import make_slots
from tlauto.errors import TlautoError

if TYPE_CHECKING:
    import torch

    from tlauto.contracts import Backbone

PLAIN = "plain script: NCHW"
NCHW, CHANNELS_LAST, FOLDED, COMPILED = "NCHW", "pytorch", "pytorch, BatchNorm folded", "torch.compile"
# A worker's process has them, a script's does not.
WORKERS = ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TLAUTO_THREADS")


def main() -> None:
    args = parse()
    if args.serve:
        serve(args)
        return
    args.data = args.data or default_data()[0]
    args.threads = args.threads or make_slots("cpu", 1)[0].threads
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        plain = stack.enter_context(process(args, folder, is_worker=False))
        worker = stack.enter_context(process(args, folder, is_worker=True))
        found = read(worker)
        places = {PLAIN: (plain, NCHW)} | {name: (worker, name) for name in found["engines"]}
        read(plain)
        seconds: dict[str, list[float]] = {name: [] for name in places}
        for _ in range(args.rounds):
            for name, (place, engine) in places.items():
                seconds[name].append(ask(place, engine))
    report(args, found, {name: args.images / statistics.median(taken) for name, taken in seconds.items()})


def report(args: argparse.Namespace, found: Mapping[str, Any], rates: Mapping[str, float]) -> None:
    """Print the table and the line of JSON."""
    print(f"{args.backbone}, {args.images} images, {args.threads} threads of {cores()} cores; "
          f"2048 x 2048 float32 product: {found['matmul_gflops']:.0f} GFLOP/s")  # fmt: skip
    print("| engine | images/s | seconds to prepare | largest difference |\n|---|---|---|---|")
    engines = {PLAIN: {"prepare_s": 0.0, "difference": 0.0}, **found["engines"]}
    for name, rate in rates.items():
        facts = engines[name]
        print(f"| {name} | {rate:.1f} | {facts['prepare_s']:.1f} | {facts['difference']:.1e} |")
    chosen, best = found["chosen"], max(rate for name, rate in rates.items() if name != PLAIN)
    print(f"tlauto chooses {chosen} for {args.of} images")
    answer = {
        "backbone": args.backbone, "images": args.images, "of": args.of, "threads": args.threads,
        "cores": cores(), "matmul_gflops": round(found["matmul_gflops"], 1), "chosen": chosen,
        "engines": {
            name: {"images_per_s": round(rate, 2), **engines[name]} for name, rate in rates.items()
        },
        "failed": found["failed"],
        "engine_ratio": round(rates[chosen] / best, 3), "nchw_ratio": round(rates[chosen] / rates[PLAIN], 3),
    }  # fmt: skip
    print(json.dumps(answer))


# --- the processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def process(args: argparse.Namespace, folder: str, *, is_worker: bool) -> Iterator[subprocess.Popen[str]]:
    """This script as a server that runs engines when asked, in a worker's environment or a script's."""
    env = {name: value for name, value in os.environ.items() if name not in WORKERS}
    if is_worker:
        env |= make_slots("cpu", 1)[0].env
    env |= {"TLAUTO_CACHE": folder, "OMP_NUM_THREADS": str(args.threads)}
    words = [sys.executable, __file__, "--serve", "worker" if is_worker else "plain"]
    for name in ("data", "backbone", "images", "of", "threads", "weights_dir"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [] if args.pretrained else ["--no-pretrained"]
    words += ["--quick"] if args.quick else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=env, text=True, bufsize=1, **pipes) as server:
        try:
            yield server
        finally:
            server.kill()


def ask(server: subprocess.Popen[str], engine: str) -> float:
    """Seconds of one pass of an engine over all images."""
    pipe(server.stdin).write(f"{engine}\n")
    return float(read(server))


def read(server: subprocess.Popen[str]) -> Any:
    """The next answer of a server."""
    line = pipe(server.stdout).readline()
    if not line:
        sys.exit("error: a process ended early; its reason stands above")
    return json.loads(line)


def pipe(file: IO[str] | None) -> IO[str]:
    assert file is not None
    return file


# --- inside them ------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> None:
    """Say what engines there are, then run the one whose name comes in, until input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(args.threads)
    backbone = load(args)
    batches = [backbone_images.contiguous() for backbone_images in read_images(args, backbone)]
    expected = run_once(partial(eager, backbone), batches[:1])
    engines = {NCHW: partial(eager, backbone)}
    facts = {NCHW: {"prepare_s": 0.0, "difference": 0.0}}
    found: dict[str, Any] = {"engines": facts, "failed": {}}
    if args.serve == "worker":
        last = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
        for name, make in makers(args, last[0]).items():
            try:
                started = time.perf_counter()
                engine = make()
                first = run_once(engine, last[:1])
            except Exception as error:  # noqa: BLE001 an exporter may raise anything
                found["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            difference = float((first - expected).abs().max() / expected.abs().max())
            facts[name] = {"prepare_s": round(time.perf_counter() - started, 2), "difference": difference}
            engines[name] = engine
        found |= {"chosen": chosen(args, last[0]), "matmul_gflops": matmul_gflops()}
    out.write(json.dumps(found) + "\n")
    for line in sys.stdin:
        name = line.strip()
        images = batches if name == NCHW else last
        started = time.perf_counter()
        run_once(engines[name], images)
        out.write(json.dumps(time.perf_counter() - started) + "\n")


def load(args: argparse.Namespace) -> Backbone:
    """The frozen backbone."""
    import torch

    from tlauto.contracts import WeightsOptions
    from tlauto.plugins import registry

    torch.manual_seed(0)  # of random weights
    options = WeightsOptions({}, args.weights_dir, True, args.pretrained)
    backbone = registry().provider(args.backbone.partition(":")[0]).load(args.backbone, options)
    backbone.set_trainable(())
    backbone.set_training(False)
    return backbone


def read_images(args: argparse.Namespace, backbone: Backbone) -> list[torch.Tensor]:
    """Batches (64, 3, H, W) of images, evenly spaced over the files of a folder."""
    import numpy as np
    import torch

    from tlauto.training.batches import EVAL_BATCH, normalise
    from tlauto.training.pixels import centre_crop, decode

    suffixes = (".jpg", ".jpeg", ".png")
    files = [file for file in sorted(Path(args.data).rglob("*")) if file.suffix.lower() in suffixes]
    if not files:
        sys.exit(f"error: no image under {args.data}")
    picked = [files[round(i)] for i in np.linspace(0, len(files) - 1, args.images)]
    crops = [centre_crop(decode(file, backbone.input), backbone.input) for file in picked]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    return [normalise(part, backbone.input, torch.device("cpu")) for part in images.split(EVAL_BATCH)]


def makers(args: argparse.Namespace, images: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """How each engine that is installed is made; the backbones are of their own."""
    import numpy as np
    import torch

    from tlauto.training.engines import CONVERTERS, Converter, FrozenFeatures, folded

    backbone = load(args)
    backbone.module.to(memory_format=torch.channels_last)

    def fold() -> Any:
        with torch.no_grad():
            found = folded(backbone, images[:1])
        if found is None:
            raise LookupError("there is no BatchNorm to fold")
        return partial(eager, found)

    def convert(converter: Converter) -> Any:
        example = images[:1].contiguous().repeat(2, 1, 1, 1)
        with torch.no_grad():
            made = converter.convert(FrozenFeatures(backbone, "pooled"), example)
        return converter.start(np.frombuffer(made, np.uint8), args.threads)

    made: dict[str, Callable[[], Any]] = {CHANNELS_LAST: lambda: partial(eager, backbone), FOLDED: fold}
    made |= {c.name: partial(convert, c) for c in CONVERTERS if c.is_installed}
    if not args.quick:
        made[COMPILED] = lambda: torch.compile(FrozenFeatures(backbone, "pooled"))
    return made


def chosen(args: argparse.Namespace, images: torch.Tensor) -> str:
    """The engine that a search takes for a dataset of --of images."""
    import torch

    from tlauto.training.engines import Extractor

    backbone = load(args)
    backbone.module.to(memory_format=torch.channels_last)
    run = Extractor(
        backbone, "pooled", torch.device("cpu"), images=args.of, weights="",
        folder=Path(os.environ["TLAUTO_CACHE"]), note=partial(print, file=sys.stderr),
    )  # fmt: skip
    run(images)
    return run.name


def eager(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    return backbone.pooled(images)


def run_once(engine: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Features of all batches."""
    import torch

    with torch.inference_mode():
        return torch.cat([engine(batch) for batch in batches])


def matmul_gflops() -> float:
    """The machine's ceiling: GFLOP/s of a product of two 2048 x 2048 float32 matrices."""
    import torch

    a, b = torch.randn(2, 2048, 2048)
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(taken[1:]) / 1e9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="a folder of images, or of folders of them")
    parser.add_argument("--backbone", default="efficientnet-lite:lite0", metavar="ID")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"), metavar="DIR")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--images", type=int, default=128, metavar="N", help="of a pass; 128")
    parser.add_argument("--of", type=int, default=2000, metavar="N", help="images that are chosen for; 2000")
    parser.add_argument("--rounds", type=int, metavar="N", help="passes of each engine; 9, or 5 if --quick")
    parser.add_argument("--threads", type=int, metavar="N", help="as a worker has them")
    parser.add_argument("--quick", action="store_true", help="fewer passes, without torch.compile")
    parser.add_argument("--serve", choices=("worker", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (5 if args.quick else 9)
    return args


if __name__ == "__main__":
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
