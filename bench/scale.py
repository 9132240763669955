"""Time and memory of a search against the number of images, classes and trials: slopes, not points.

    python bench/scale.py
    python bench/scale.py --quick            # 1,000 and 5,000 images, a smaller network; minutes
    python bench/scale.py --images 1000 50000 --backbone efficientnet-lite:lite0

Draws data sets of small JPEG files (64 pixels, a pattern and a colour of each class over noise; drawing
does not count) and runs `tlauto search` on each with an empty cache, random weights and frozen backbones,
with linear heads, which are solved, and narrow ones of two layers, which are trained in mini-batches.
Three series: images, with --few classes; classes and trials, both with the fewest images that are given
for them. While a search runs, the anonymous memory (`RssAnon`) of the coordinator and its workers is read
twenty times a second. Pages of files that a process has mapped, such as cached pixels and features, are not
in it: they lie on disk, and the system takes them back when memory is needed. Linux only.

The last line of standard output is one JSON object:

    memory_growth           peak memory of coordinator and workers together with the most images over that
                            with the fewest
    coordinator_growth, worker_growth   the same of each by itself
    slopes                  by series: seconds, and MiB of coordinator and worker, per 1,000 images, per 100
                            classes, per 100 trials, by least squares over all points
    runs                    each point: images, classes, trials, peaks in MiB, seconds in all and by stage:
                            `data` (reading, checking, splitting), `start` (workers, backbones), `trials`
                            (features included) and `finish` (refit, test, bundle)
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 64  # pixels
EVERY_S = 0.05
MIB = 2**20
NARROW = ("--set", "head.mlp.hidden=128", "--set", "head.mlp.input=pooled")
"""One wide head takes more time and memory than all else, and more by chance than by what is varied."""
ENDS = (("data", "images "), ("start", "slots "), ("trials", "refitting "))
"""Stages and the beginning of the line on standard error with which each ends."""


@dataclass(frozen=True)
class Point:
    """What is measured: one search."""

    images: int
    classes: int
    trials: int


@dataclass
class Peaks:
    """Most anonymous memory, MiB, of the coordinator, of one worker, and of all at the same moment."""

    coordinator: float = 0.0
    worker: float = 0.0
    together: float = 0.0

    def note(self, coordinator: float, workers: Sequence[float]) -> None:
        self.coordinator = max(self.coordinator, coordinator)
        self.worker = max([self.worker, *workers])
        self.together = max(self.together, coordinator + sum(workers))


def main() -> None:
    args = parse()
    series = {
        "images": [Point(n, args.few, args.base_trials) for n in args.images],
        "classes": [Point(args.class_images, n, args.base_trials) for n in args.classes],
        "trials": [Point(args.images[0], args.few, n) for n in args.trials],
    }
    measured: dict[Point, dict[str, Any]] = {}
    print(f"{'images':>8}{'classes':>8}{'trials':>7}{'coordinator':>13}{'worker':>9}{'seconds':>9}  by stage")
    for point in dict.fromkeys(point for points in series.values() for point in points):
        measured[point] = found = measure(point, args)
        memory = f"{found['coordinator']:9.0f} MiB{found['worker']:5.0f} MiB"
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["stages"].items())
        facts = f"{point.images:8}{point.classes:8}{point.trials:7}"
        print(f"{facts}{memory}{found['seconds']:9.1f}  {stages}", flush=True)
    slopes = {name: slopes_of(name, points, measured) for name, points in series.items()}
    first, last = (measured[point] for point in (series["images"][0], series["images"][-1]))
    growth = {name: last[name] / first[name] for name in ("together", "coordinator", "worker")}
    figures = {"memory_growth": growth.pop("together"), **{f"{k}_growth": v for k, v in growth.items()}}
    runs = [{**asdict(point), **found} for point, found in measured.items()]
    about = {"backbone": args.backbone, "cores": os.cpu_count()}
    print(json.dumps({**figures, "slopes": slopes, **about, "runs": runs}))


def slopes_of(
    name: str, points: Sequence[Point], measured: dict[Point, dict[str, Any]]
) -> dict[str, float] | None:
    """Seconds and MiB per 1,000 images, 100 classes or 100 trials; None of a single point."""
    places = [getattr(point, name) / (1000 if name == "images" else 100) for point in points]
    if len(set(places)) < 2:
        return None
    found = {}
    for figure in ("seconds", "coordinator", "worker"):
        values = [measured[point][figure] for point in points]
        found[figure] = float(np.polyfit(places, values, 1)[0])
    return found


# --- one search -------------------------------------------------------------------------------------


def measure(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Peaks and seconds of one search on a data set that is drawn for it."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder, "images"), point.images, point.classes, args.seed)
        command = [
            sys.executable, "-m", "tlauto", "search", "--data", "images", "--backbones", args.backbone,
            "--no-pretrained", "--offline", "--strategies", "feature_extraction", "--heads", "linear,mlp",
            "--trials", str(point.trials), "--seed", str(args.seed), "--devices", args.devices, *NARROW,
        ]  # fmt: skip
        env = {**os.environ, "TLAUTO_CACHE": str(Path(folder, "cache")), "COLUMNS": "200"}
        return watch(command, folder, env)


def watch(command: Sequence[str], folder: str, env: dict[str, str]) -> dict[str, Any]:
    """Run a search to its end; its stages by what it says, its memory by what the system says."""
    started, lines, marks, peaks = time.perf_counter(), [], [], Peaks()
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        done = threading.Event()
        sampler = threading.Thread(target=sample, args=(process.pid, peaks, done))
        sampler.start()
        for line in process.stderr or ():
            lines.append(line)
            said = line.removeprefix("…").strip()
            if len(marks) < len(ENDS) and said.startswith(ENDS[len(marks)][1]):
                marks.append(time.perf_counter() - started)
        process.wait()
        done.set()
        sampler.join()
    seconds = time.perf_counter() - started
    if process.returncode or len(marks) < len(ENDS):
        sys.exit("".join(lines[-5:]).strip() or f"error: {' '.join(command)} failed")
    times = np.diff([0.0, *marks, seconds]).tolist()
    stages = dict(zip([*(name for name, _ in ENDS), "finish"], times, strict=True))
    return {**asdict(peaks), "seconds": seconds, "stages": stages}


def sample(pid: int, peaks: Peaks, done: threading.Event) -> None:
    """Note the memory of a process and of all below it until told to stop."""
    while not done.wait(EVERY_S):
        peaks.note(anonymous(pid), [anonymous(child) for child in below(pid)])


def below(pid: int) -> Iterator[int]:
    """Process ids of children, their children and so on."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    for child in map(int, children):
        yield child
        yield from below(child)


def anonymous(pid: int) -> float:
    """Anonymous memory of a process in MiB; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 / MIB if found else 0.0


# --- the images -------------------------------------------------------------------------------------


def draw(root: Path, images: int, classes: int, seed: int) -> None:
    """A folder of class folders of JPEG files, no two alike, as many of each class as of any other."""
    for index in range(images):
        target = index % classes
        file = root / f"class{target:04d}" / f"{index:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(target, np.random.default_rng((seed, index))).save(file, quality=85)


def picture(target: int, random: np.random.Generator) -> Image.Image:
    """Random patches of brightness with waves whose direction, width and colour are the class' own."""
    patches = np.kron(random.normal(110, 40, (8, 8)), np.ones((SIDE // 8, SIDE // 8)))
    angle, width = 2.4 * target, 4 + target % 7
    rows, columns = np.mgrid[:SIDE, :SIDE]
    along = rows * np.cos(angle) + columns * np.sin(angle)
    waves = 25 * np.sin(2 * np.pi * along / width + random.uniform(0, 2 * np.pi))
    tint = 60 * np.array(colorsys.hsv_to_rgb(0.618 * target % 1, 1, 1))
    pixels = (patches + waves)[:, :, None] + tint + random.normal(0, 8, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", help="1000 5000 20000 50000 by default")
    parser.add_argument("--classes", type=int, nargs="*", help="2 100 1000 by default")
    parser.add_argument("--class-images", type=int, help="images while classes vary; 5000 by default")
    parser.add_argument("--trials", type=int, nargs="*", help="20 100 200 by default")
    parser.add_argument("--base-trials", type=int, default=6, help="while images or classes vary")
    parser.add_argument("--few", type=int, default=10, help="classes while images or trials vary")
    parser.add_argument("--backbone", help="efficientnet-lite:lite0; with --quick a network for tests")
    parser.add_argument("--devices", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="1000 and 5000 images, up to 50 classes")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc, which this system has not; run it on Linux")
    usual: dict[str, Any] = {
        "images": [1000, 5000, 20000, 50000], "classes": [2, 100, 1000], "class_images": 5000,
        "trials": [20, 100, 200], "backbone": "efficientnet-lite:lite0",
    }  # fmt: skip
    if args.quick:
        usual = {"images": [1000, 5000], "classes": [2, 50], "class_images": 1000, "trials": [6, 30]}
        usual["backbone"] = "timm:test_efficientnet.r160_in1k"
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.images = sorted(args.images)
    return args


if __name__ == "__main__":
    main()
