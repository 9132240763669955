"""What people do with AutoGluon: `MultiModalPredictor.fit` on a table of image paths, with a time limit.

    python bench/handover.py --data DIR --out FOLDER --export --weights-dir DIR
    PYTHON bench/autogluon_images.py --handed FOLDER/handed.json --time 300

PYTHON is the interpreter of an environment of its own, which needs no tlauto; `anytime.py` does both
steps when it is given one (`--python autogluon=PYTHON`). AutoGluon wants older versions of torch and timm
than tlauto is tested with, so without constraints:

    python -m venv autogluon-env && autogluon-env/bin/python -m pip install autogluon.multimodal

It takes one backbone, the first of those handed over that timm builds without further arguments: its
own choice of backbone is a download. Its weights are given as a local folder, as of a model that was
saved; all else is AutoGluon's default. There is no model before the time limit has passed, so
`anytime.py` runs it once a budget. The last line of standard output is one JSON object: the backbone, and
`curve`, with one row: seconds (imports included, tests not), validation and test accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import handed
import torch
from curve import Clock, Curve

os.environ["HF_HUB_OFFLINE"] = "1"

try:
    import pandas  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from autogluon.multimodal import MultiModalPredictor  # type: ignore[import-not-found]
except ImportError as error:
    sys.exit(f"error: this environment has no AutoGluon ({error}); see {sys.argv[0]}")


def main() -> None:
    args = parse()
    curve = Curve(Clock())
    given = handed.read(args.handed)
    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder, "backbone")
        network = choose(given, backbone)
        kind = "binary" if len(given.classes) == 2 else "multiclass"
        predictor = MultiModalPredictor(
            label="label", problem_type=kind, eval_metric="accuracy", path=str(Path(folder, "model"))
        )
        left = args.time - curve.clock.now()
        predictor.fit(
            table(given, "train"), tuning_data=table(given, "val"), time_limit=left, seed=args.seed,
            hyperparameters={
                "model.names": ["timm_image"],
                "model.timm_image.checkpoint_name": str(backbone),
            },
        )  # fmt: skip
        val = curve.clock.stand(lambda: right(predictor, given, "val"))
        curve.offer(sum(val) / len(val), lambda: right(predictor, given, "test"))
    print(json.dumps({"backbone": network.id, "time": args.time, **curve.facts()}))


def choose(given: handed.Handed, folder: Path) -> handed.Network:
    """The first network that AutoGluon can be given and its timm, an older one, has; saved in a folder."""
    for network in given.networks:
        if network.library != "timm" or network.kwargs:
            continue
        try:
            save(network, folder)
        except (RuntimeError, ValueError) as error:
            print(f"{network.id} is left out: {error}", flush=True)
            continue
        return network
    sys.exit("error: no network was handed over that AutoGluon can be given; it needs one of timm")


def save(network: handed.Network, folder: Path) -> None:
    """The folder that AutoGluon reads a backbone from: timm's configuration and weights."""
    model: Any = handed.build(network)
    folder.mkdir()
    side = [3, network.size, network.size]
    config = {**model.default_cfg, "input_size": side, "mean": network.mean, "std": network.std}
    facts = {"architecture": network.arch, "num_features": model.num_features, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(facts, default=str), encoding="utf-8")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def table(given: handed.Handed, part: str) -> Any:
    """Paths and classes of a part of the split."""
    rows = given.parts[part]
    return pandas.DataFrame({"image": [path for path, _ in rows], "label": [target for _, target in rows]})


def right(predictor: Any, given: handed.Handed, part: str) -> list[bool]:
    """Which images of a part are answered right, in the split's order."""
    rows = table(given, part)
    answers = predictor.predict(rows.drop(columns="label"), as_pandas=False)
    return [bool(one) for one in answers == rows["label"].to_numpy()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--handed", required=True, metavar="FILE", help="what handover.py wrote")
    parser.add_argument("--time", type=float, default=300.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
