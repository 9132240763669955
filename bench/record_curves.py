"""Record trials of randomly drawn points, epoch by epoch, for the simulator of search policies.

    python bench/record_curves.py --data DIR --weights-dir DIR --configs 600 --minutes 25 \
        --backbones keras:MobileNet-0.25-128,torchvision:squeezenet1_1 --out bench/curves

Runs the worker's own code (`tlauto.worker.serve`) in this one process and writes
OUT/<dataset>.jsonl.gz after every trial; the same command goes on where it was stopped. The first points
are those that a search begins with, the others are drawn from its space: strategies in the shares of
`--shares`, everything else uniformly (in the logarithm where the space says so). What the `balanced`
preset fixes stays fixed, since the search that is simulated does not try it either.

Nothing is pruned and patience is off for trials that train the backbone, so that every epoch is known;
they all start from the head of the backbone's probe. Frozen trials end as in a search. One that comes
near the probe on validation runs once more with cross-validation, since a search would ask for that.
Every final model is tested, outside its seconds: policies choose by validation, and are judged by that.

Seconds are processor time of this process, so they hardly depend on what else runs; the load is in the
table's header all the same. A backbone's first pass over the images is timed by itself. Activations of
frozen stages are kept between trials as in a search: the first trial that needs some pays for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from curves import ALONE, FORMAT, PRESET, Recorded, Table, load, use_preset

from tlauto.config import SearchConfig
from tlauto.contracts import EpochResult, TrialDone, TrialFailed, TrialSpec, trains_backbone
from tlauto.data import Dataset
from tlauto.devices import available_cores, make_slots
from tlauto.errors import DataError, TlautoError
from tlauto.pace import PROBE_STRATEGY
from tlauto.plugins import loaded_libraries, registry
from tlauto.pool.protocol import Answer, Message, RunTrial, Stop
from tlauto.schedule import INIT_FILES, Plan
from tlauto.searchspace import SearchSpace
from tlauto.space import Choice, Float, Int, Parameter, Scalar
from tlauto.study import TrialRecord
from tlauto.worker import serve

SHARES = "feature_extraction=0.8,partial=0.15,full=0.05"

MARGIN = 0.03
"""How far below the probe's validation score a frozen trial is still cross-validated."""

Point = dict[str, Scalar]
Epoch = tuple[float, float, float]
SAME = ("format", "data", "fingerprint", "seed", "epochs", "epoch_images", "fixed", "shares", "pretrained")
"""What a table that goes on must agree in, besides its backbones."""


def main() -> None:
    args = parse()
    use_worker_environment(args.threads)
    try:
        print(json.dumps(record(args)))
    except TlautoError as error:
        sys.exit(f"error: {error}")


def use_worker_environment(threads: int) -> None:
    """Start this process again with the variables that a worker gets, which act from the start only."""
    if "TLAUTO_THREADS" not in os.environ:
        slot = make_slots("cpu", max(1, available_cores() // threads))[0]
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **slot.env})


def record(args: argparse.Namespace) -> dict[str, Any]:
    """Record until there are enough trials or the time is up. Returns: what the table holds now."""
    import torch
    from handover import place  # imports torch, which must not be before the environment is a worker's

    torch.set_num_threads(int(os.environ["TLAUTO_THREADS"]))
    deadline = time.monotonic() + 60 * args.minutes
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    args.data = str(place(args.data, out, test_rest=args.test_rest))
    work = Path(args.work or out / f"{Path(args.data).stem}.work").resolve()
    os.environ["TLAUTO_CACHE"] = str(work / "cache")
    plan, dataset, header = open_data(args, work)
    path = out / f"{header['data']}.jsonl.gz"
    table = continued(path, header)
    table.header["runs"].append(about_run())
    recorder = Recorder(plan, dataset, table, path)
    for number, point, purpose in points(plan, args):
        if time.monotonic() >= deadline:
            break
        recorder.need(number, point, purpose)
    failed = len(table.rows) - len(table.sound)
    return {"table": str(path), "configs": len(table.rows), "failed": failed, "bytes": path.stat().st_size}


def open_data(args: argparse.Namespace, work: Path) -> tuple[Plan, Dataset, dict[str, Any]]:
    """Plan and images as a search has them, and the table's header."""
    from tlauto.events import ignore
    from tlauto.prepare import open_session

    use_preset(args.epochs, args.epoch_images)
    config = SearchConfig(
        data=str(Path(args.data).resolve()), out=str(work), study="curves", preset=PRESET,
        backbones=tuple(args.backbones.split(",")) if args.backbones else (), devices="cpu", workers=0,
        strategies=tuple(args.shares),
        seed=args.seed, weights_dir=args.weights_dir, offline=args.offline, pretrained=args.pretrained,
        allow_leaks=True,
    )  # fmt: skip
    session = open_session(config, emit=ignore)
    session.close(state="interrupted")
    return session.plan, session.dataset, header_of(args, session.plan, session.dataset, session.infos)


def header_of(
    args: argparse.Namespace, plan: Plan, dataset: Dataset, infos: Mapping[str, Any]
) -> dict[str, Any]:
    """What the first line of a table says."""
    return {
        "format": FORMAT,
        "data": Path(args.data).stem,
        "fingerprint": dataset.fingerprint,
        "task": plan.task,
        "metric": plan.metric,
        "classes": len(dataset.classes),
        "sizes": list(plan.sizes),
        "seed": args.seed,
        "epochs": args.epochs,
        "epoch_images": args.epoch_images,
        "pretrained": args.pretrained,
        "shares": args.shares,
        "backbones": [dataclasses.asdict(info) for info in infos.values()],
        "strategies": [strategy.name for strategy in plan.space.strategies],
        "heads": [head.name for head in plan.space.heads],
        "fixed": {name: value for name, value in plan.space.fixed.items() if name not in ALONE},
        "features_seconds": {},
        "runs": [],
    }


def about_run() -> dict[str, Any]:
    """Where and when a run recorded; its seconds are processor time whatever the load was."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "clock": "processor seconds",
        "load": [round(load, 1) for load in os.getloadavg()],
        "cores": available_cores(),
        "threads": int(os.environ["TLAUTO_THREADS"]),
        "versions": dict(loaded_libraries()),
    }


def continued(path: Path, header: dict[str, Any]) -> Table:
    """The table at a path, or a new one. Raises: DataError when it was recorded otherwise."""
    if not path.is_file():
        return Table(header)
    table = load(path)
    wrong = [name for name in SAME if table.header[name] != header[name]]
    if [info["id"] for info in table.header["backbones"]] != [info["id"] for info in header["backbones"]]:
        wrong.append("backbones")
    if wrong:
        raise DataError(f"{path} was recorded with other {wrong[0]}; use the old ones, or another --out")
    return table


def points(plan: Plan, args: argparse.Namespace) -> Iterator[tuple[int, Point, str]]:
    """The numbered points to record: those that a search begins with, then drawn ones."""
    first = plan.first_points(None)
    for number in range(args.configs):
        if number < len(first):
            yield number, *first[number]
        else:
            yield number, draw(plan.space, args.shares, f"{args.seed}/{number}"), "search"


def draw(space: SearchSpace, shares: Mapping[str, float], seed: str) -> Point:
    """A random point; the strategy by its share."""
    source = random.Random(seed)

    def pick(name: str, parameter: Parameter) -> Scalar:
        if name == "strategy" and isinstance(parameter, Choice):
            weights = [shares.get(str(value), 0.0) for value in parameter.values]
            return source.choices(parameter.values, weights)[0]
        match parameter:
            case Choice():
                return source.choice(parameter.values)
            case Float(low, high, _, log):
                value = low * (high / low) ** source.random() if log else source.uniform(low, high)
                return float(f"{value:.4g}")  # what the table can say exactly
            case Int(low, high, _, log):
                # Every whole number has the same width, in the logarithm where that is uniform.
                edges = (low - 0.5, high + 0.5)
                at = edges[0] * (edges[1] / edges[0]) ** source.random() if log else source.uniform(*edges)
                return min(high, max(low, round(at)))

    return space.walk(pick)


class Recorder:
    """Runs trials and keeps what they do."""

    def __init__(self, plan: Plan, dataset: Dataset, table: Table, path: Path) -> None:
        self.plan = plan
        self.dataset = dataset
        self.table = table
        self.path = path
        self.known = {row.number: row for row in table.rows}
        self.probes: dict[str, tuple[Path, float]] = {}
        self.warmed: set[str] = set()

    def need(self, number: int, point: Point, purpose: str) -> None:
        """Record a point unless that was done; a probe's head must be there in any case."""
        spec = self.spec(number, point, purpose)
        is_missing = number not in self.known
        folder = Path(spec.folder)
        if is_missing:
            self.warm(spec)
            self.known[number] = self.run(spec)
            self.table.rows.append(self.known[number])
            self.table.save(self.path)
            shown = f"{spec.backbone}  {spec.strategy}  {spec.head}"
            print(f"{number:4d}  {self.known[number].seconds:7.2f} s  {shown}", flush=True)
        elif purpose == "probe" and not any((folder / name).is_file() for name in INIT_FILES):
            self.measure(spec)
        if purpose != "probe":
            shutil.rmtree(folder, ignore_errors=True)
        elif self.known[number].failed is None:
            head = next(folder / name for name in INIT_FILES if (folder / name).is_file())
            self.probes[spec.backbone] = head, self.known[number].score

    def spec(self, number: int, point: Point, purpose: str) -> TrialSpec:
        """What a search would have a worker do, without anything that ends it early."""
        spec = self.plan.spec(TrialRecord(number, "running", point, None, {"purpose": purpose}), [])
        # A cache of its own: what a backbone costs must not depend on which came before.
        spec = dataclasses.replace(spec, cache=str(Path(spec.cache, spec.backbone.replace(":", "-"))))
        if not trains_backbone(registry().strategy(spec.strategy)):
            return spec
        head = self.probes.get(spec.backbone)
        return dataclasses.replace(spec, patience=0, init_head=str(head[0]) if head else None)

    def warm(self, spec: TrialSpec) -> None:
        """Have the backbone's features cached, and know what a first pass for them takes."""
        known = self.table.header["features_seconds"]
        if spec.backbone in self.warmed:
            return
        if spec.backbone not in known:
            shutil.rmtree(spec.cache, ignore_errors=True)  # of a pass that was stopped
        seconds = self.features(spec)
        if spec.backbone not in known:
            known[spec.backbone] = seconds
            self.table.save(self.path)
        mirrored = (row.params["backbone"] for row in self.table.rows if row.params.get("probe.mirror"))
        if spec.backbone in mirrored:  # a trial has paid for them, if in another folder
            self.features(spec, mirror=True)
        self.warmed.add(spec.backbone)

    def features(self, spec: TrialSpec, *, mirror: bool = False) -> float:
        """Seconds to decode the images outside the test part and compute their features."""
        import torch

        from tlauto.training.features import FeatureSource

        source = FeatureSource(spec, registry(), self.dataset, torch.device("cpu"), mirror=mirror)
        _ = source.facts  # building it is not a part of that
        started = time.process_time()
        for part in ("train", "val"):
            source.features([part], "pooled")
        return round(time.process_time() - started, 3)

    def run(self, spec: TrialSpec) -> Recorded:
        """Run a trial, test its model, and cross-validate it where a search would."""
        point = {"backbone": spec.backbone, "strategy": spec.strategy, "head": spec.head, **spec.params}
        done, epochs, seconds = self.measure(spec)
        if isinstance(done, TrialFailed):
            return Recorded(spec.number, point, (), seconds, failed=(done.kind, done.message))
        test, held_out, proven = self.test(spec, done), done.held_out, seconds
        probe = self.probes.get(spec.backbone)
        if held_out is None and spec.strategy == PROBE_STRATEGY and probe and done.score >= probe[1] - MARGIN:
            again, _, proven = self.measure(dataclasses.replace(spec, prove_above=float("-inf")))
            held_out = again.held_out if isinstance(again, TrialDone) else None
        return Recorded(
            number=spec.number,
            params=point,
            epochs=epochs,
            seconds=seconds,
            best_epoch=min(done.best_epoch, len(epochs)),
            held_out=None if held_out is None else round(held_out, 4),
            proven_seconds=None if held_out is None else proven,
            test=round(test, 4),
        )

    def measure(self, spec: TrialSpec) -> tuple[TrialDone | TrialFailed, list[Epoch], float]:
        """Have the worker's code run a trial: how it ended, what each epoch gave, and its seconds."""
        jobs: deque[Message] = deque([RunTrial(spec), Stop()])
        epochs: list[Epoch] = []
        ended: list[tuple[TrialDone | TrialFailed, float]] = []
        started = last = time.process_time()

        def send(message: Message) -> None:
            nonlocal last
            now = time.process_time()
            if isinstance(message, EpochResult):
                epochs.append((round(message.score, 4), round(message.val_loss, 4), round(now - last, 3)))
                jobs.appendleft(Answer(go_on=True))
                last = now
            elif isinstance(message, (TrialDone, TrialFailed)):
                ended.append((message, round(now - started, 3)))

        serve(jobs.popleft, send, "cpu")
        return ended[0][0], epochs, ended[0][1]

    def test(self, spec: TrialSpec, done: TrialDone) -> float:
        """Score of a trial's model on the test part."""
        import torch

        from tlauto.training.batches import centre_batches
        from tlauto.training.checkpoint import kind_of, start_from
        from tlauto.training.model import restore
        from tlauto.training.trial import prepare

        device, checkpoint = torch.device("cpu"), Path(spec.folder, done.checkpoint)
        tested = dataclasses.replace(spec, evaluate_on="test")
        trial = prepare(tested, registry(), self.dataset, device)
        with torch.inference_mode():
            if trains_backbone(trial.strategy):
                model = restore(spec, registry(), self.dataset, checkpoint, "cpu")
                batches = centre_batches(trial.source.pixels(["test"]), device)
                logits = torch.cat([model(batch) for batch in batches])
            else:
                readout = trial.readout(kind_of(checkpoint))
                start_from(readout, checkpoint, spec)
                logits = readout.eval().read(trial.source.features(["test"], readout.kind).tensor())
        return trial.evaluate(logits, done.best_epoch).score


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="dataset folder or manifest; DIR:N: N images a class")
    parser.add_argument("--test-rest", action="store_true", help="with DIR:N: test on all other images")
    parser.add_argument("--out", default=str(Path(__file__).with_name("curves")), help="folder of the tables")
    parser.add_argument("--work", help="folder of caches and probes; by default beside the table")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"))
    parser.add_argument("--backbones", default="", help="ids or globs, commas between them")
    parser.add_argument("--configs", type=int, default=600, help="trials in the finished table")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial after these")
    parser.add_argument("--epochs", type=int, default=8, help="of a trial that trains the backbone")
    parser.add_argument("--epoch-images", type=int, default=128, help="images of such an epoch")
    parser.add_argument(
        "--shares", type=parse_shares, default="feature_extraction=0.8,partial=0.15,full=0.05"
    )
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def parse_shares(text: str) -> dict[str, float]:
    """`name=share,name=share` as numbers."""
    pairs = [part.partition("=") for part in text.split(",")]
    return {name: float(share) for name, _, share in pairs}


if __name__ == "__main__":
    main()
