"""Do some of the images choose a linear head's penalty and features as well as all of them?

    python bench/some.py --data DIR --weights-dir DIR --backbones efficientnet-lite:lite0

Of many images a search lets 2,048 choose by cross-validation (`tlauto.training.solved`); here 600 and 300 of
a smaller dataset do, with the penalty lowered by their share of the rows as there, beside cross-validation
on all. Prints log loss and score on the validation part and the seconds of each trial, whose features are
there already. The test part is not opened. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tlauto.contracts import TrialSpec, WeightsOptions
from tlauto.data import Dataset, load_dataset
from tlauto.plugins import registry
from tlauto.training import solved
from tlauto.training.fit import run_trial

EVERYTHING = 10**9


def main() -> None:
    args = parse()
    dataset, _ = load_dataset(args.data, seed=args.seed, allow_leaks=True)
    rows = [row for backbone in args.backbones.split(",") for row in compared(args, dataset, backbone)]
    print(json.dumps({"data": Path(args.data).stem, "cores": os.cpu_count(), "rows": rows}))


def compared(args: argparse.Namespace, dataset: Dataset, backbone: str) -> Iterator[dict[str, Any]]:
    """The trials of one backbone: chosen by all images, then by some."""
    with tempfile.TemporaryDirectory() as folder:
        measured(args, dataset, backbone, Path(folder), EVERYTHING)  # computes the features
        for some in (EVERYTHING, *args.some):
            found = measured(args, dataset, backbone, Path(folder), some)
            shown = "all" if some == EVERYTHING else some
            scores = f"loss {found['loss']:.4f}  score {found['score']:.4f}"
            print(f"{backbone:28} {shown!s:>5} choose  {scores}  {found['seconds']:6.2f} s", flush=True)
            yield {"backbone": backbone, "some": shown, **found}


def measured(
    args: argparse.Namespace, dataset: Dataset, backbone: str, folder: Path, some: int
) -> dict[str, float]:
    """Validation loss, score and seconds of one trial that so many rows choose for."""
    solved.MANY, solved.SOME = (EVERYTHING, 0) if some == EVERYTHING else (0, some)
    place = folder / str(some)
    place.mkdir(exist_ok=True)
    spec = TrialSpec(
        number=0, dataset="", task=dataset.task, metric=args.metric, backbone=backbone,
        strategy="feature_extraction", head="linear", params={"probe.solver": "path"}, seed=args.seed,
        epochs=1, folder=str(place), cache=str(folder / "cache"),
        weights=WeightsOptions({}, args.weights_dir, True, args.pretrained),
    )  # fmt: skip
    started = time.perf_counter()
    done = run_trial(spec, registry(), dataset, device="cpu", on_epoch=lambda _: True)
    return {"loss": done.val_loss, "score": done.score, "seconds": time.perf_counter() - started}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="dataset folder or manifest")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"))
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false")
    parser.add_argument("--backbones", default="efficientnet-lite:lite0", help="commas between them")
    parser.add_argument("--some", type=int, nargs="+", default=[600, 300], help="images that choose")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    main()
