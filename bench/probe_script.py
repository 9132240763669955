"""The alternative to a search: logistic regression on a backbone's frozen features, in one short script.

    python bench/probe_script.py --data DIR --weights-dir DIR --backbone torchvision:mobilenet_v2 \
        --backbone timm:resnet18=resnet18.safetensors

For each backbone: its library's own evaluation transform, pooled features in batches, StandardScaler
and LogisticRegression with C by cross-validation over all images outside the test part, then the test
part once. The best backbone is chosen by cross-validation, never by the test part. Only two things
are tlauto's: the split, so that both are measured on the same images, and finding and loading weights.
The last line of standard output is one JSON object; in it, `curve` is a list of seconds (imports included,
tests not), cross-validated and test accuracy of each new best, and `whole_s` the seconds of the whole run
with one test, that of the best backbone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from curve import Clock, Curve
from curve import cores as cores  # other scripts take it from here
from PIL import Image, ImageOps

from tlauto.contracts import Backbone, WeightsOptions
from tlauto.data import Dataset, load_dataset
from tlauto.errors import TlautoError
from tlauto.plugins import registry

Transform = Callable[[str], torch.Tensor]
GRID = [10.0**power for power in range(-5, 2)]
BATCH = 32


def main() -> None:
    args = parse()
    curve = Curve(Clock())
    dataset, _ = load_dataset(args.data, seed=args.seed, allow_leaks=args.allow_leaks)
    if dataset.task != "multiclass":
        sys.exit(f"error: {args.data} is for {dataset.task}; this script does classes only")
    parts = {"train": dataset.part("train", "val"), "test": dataset.part("test")}
    counts = ", ".join(f"{name} {len(items)}" for name, items in parts.items())
    print(f"data      {args.data}: {len(dataset.classes)} classes, {counts}")
    print(f"{'cv':>10}  {'C':>6}  {'test accuracy':<21}  {'time':>7}  backbone", flush=True)
    probes = [Probe(spec, args, dataset, curve) for spec in args.backbones]
    best = max(probes, key=lambda probe: probe.cv)
    for probe in [best] if args.best_only else []:
        probe.test(curve)
        print(probe.line())
    print(f"best      {best.id} (by cross-validation)")
    facts = {"data": args.data, "seed": args.seed, "cores": cores(), "test_images": len(parts["test"])}
    facts |= {"whole_s": curve.clock.now() + best.test_s, **curve.facts()}
    print(json.dumps({**facts, "backbones": [probe.result for probe in probes], "best": best.result}))


class Probe:
    """One backbone: features, cross-validation and, unless only the best is wanted, the test."""

    def __init__(self, spec: str, args: argparse.Namespace, dataset: Dataset, curve: Curve) -> None:
        started = time.perf_counter()
        self.id, _, file = spec.partition("=")
        self.dataset, self.balanced, self.seed = dataset, args.balanced, args.seed
        options = WeightsOptions(
            {self.id: file} if file else {}, args.weights_dir, args.offline, args.pretrained
        )
        backbone = registry().provider(self.id.partition(":")[0]).load(self.id, options)
        self.transform, self.network = transform(self.id, backbone), backbone.module
        self.model, self.cv = self._fit(*self._read("train", "val"))
        seconds = time.perf_counter() - started
        self.result: dict[str, Any] = {"backbone": self.id, "cv": self.cv, "seconds": seconds}
        self.result |= {name.partition("__")[2]: value for name, value in self.model.best_params_.items()}
        self.test_s = 0.0
        if not args.best_only:
            self.test(curve)
        print(self.line(), flush=True)

    def _read(self, *parts: str) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) and class indices (N,) of parts of the dataset."""
        items = self.dataset.part(*parts)
        files = [str(self.dataset.file(item)) for item in items]
        return features(self.network, files, self.transform), np.array([item.target for item in items])

    def _fit(self, x: np.ndarray, y: np.ndarray) -> tuple[Any, float]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        grid: dict[str, list[Any]] = {"logisticregression__C": GRID}
        if self.balanced:
            grid["logisticregression__class_weight"] = [None, "balanced"]
        folds = StratifiedKFold(max(2, min(5, np.bincount(y).min())), shuffle=True, random_state=self.seed)
        score = "balanced_accuracy" if self.balanced else "accuracy"
        search = GridSearchCV(model, grid, scoring=score, cv=folds, n_jobs=cores()).fit(x, y)
        return search, float(search.best_score_)

    def test(self, curve: Curve) -> None:
        """Measure on the test part, the clock stopped; adds `test` and the seconds it took to `result`."""
        right = curve.clock.stand(self._test)
        curve.offer(self.cv, lambda: right)

    def _test(self) -> list[bool]:
        from sklearn.metrics import balanced_accuracy_score

        started = time.perf_counter()
        x, y = self._read("test")
        answers = self.model.predict(x)
        low, high = wilson(int((answers == y).sum()), len(y))
        found = {"accuracy": {"value": float((answers == y).mean()), "low": low, "high": high}}
        if self.balanced:
            found["balanced_accuracy"] = {"value": float(balanced_accuracy_score(y, answers))}
        self.result["test"] = found
        self.test_s = time.perf_counter() - started
        self.result["seconds"] += self.test_s
        return [bool(one) for one in answers == y]

    def line(self) -> str:
        """A row of the table."""
        found, shown = self.result.get("test"), ""
        if found:
            accuracy = found["accuracy"]
            shown = f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        balanced = f"  balanced {found['balanced_accuracy']['value']:.3f}" if found and self.balanced else ""
        start = f"{self.cv:>10.3f}  {self.result['C']:>6g}  {shown:<21}"
        return f"{start}  {self.result['seconds']:>5.1f} s  {self.id}{balanced}"


# --- features --------------------------------------------------------------------------------------


def features(network: torch.nn.Module, files: Sequence[str], transform: Transform) -> np.ndarray:
    """Pooled features (N, D) of image files; the networks come without classifier."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.eval().to(device)
    found = []
    with torch.inference_mode(), ThreadPoolExecutor(cores()) as threads:
        for start in range(0, len(files), BATCH):
            images = torch.stack(list(threads.map(transform, files[start : start + BATCH])))  # (N, 3, H, W)
            found.append(network(images.to(device)).float().cpu().numpy())
    return np.concatenate(found)


def transform(id: str, backbone: Backbone) -> Transform:
    """The evaluation transform of the backbone's own library: a file to a tensor (3, H, W)."""
    provider, _, name = id.partition(":")
    if provider == "keras":
        return keras_transform(name)
    if provider == "torchvision":
        from torchvision import models

        arch, _, tag = name.partition(".")
        published = list(models.get_model_weights(arch))
        # A local file without a tag: the classic weights, which came first.
        made = next((entry for entry in published if entry.name == tag), published[0]).transforms()
        # GoogLeNet and Inception turn ImageNet's normalisation into their own inside the network.
        made.mean, made.std = list(backbone.input.mean), list(backbone.input.std)
    elif hasattr(backbone.module, "pretrained_cfg"):
        import timm.data

        config = timm.data.resolve_model_data_config(backbone.module)
        # Weights ported from elsewhere may want another normalisation than timm's own.
        config |= {"mean": backbone.input.mean, "std": backbone.input.std}
        made = timm.data.create_transform(**config, is_training=False)
    else:
        sys.exit(f"error: no evaluation transform is known for {id}")
    return lambda file: made(open_image(file))


def keras_transform(name: str) -> Transform:
    """Keras' own: a resized square, then the application's `preprocess_input`."""
    import keras

    from tlauto.builtin.keras_catalogue import CATALOGUE

    app = CATALOGUE[name]
    modules = [m for m in vars(keras.applications).values() if hasattr(m, "preprocess_input")]
    prepare = next(m for m in modules if hasattr(m, app.function)).preprocess_input

    def read(file: str) -> torch.Tensor:
        image = open_image(file).resize((app.size, app.size), Image.Resampling.BILINEAR)
        pixels = prepare(keras.utils.img_to_array(image, data_format="channels_last"), "channels_last")
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)

    return read


def open_image(file: str) -> Image.Image:
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


# --- the rest --------------------------------------------------------------------------------------


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    share, shrink = correct / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / shrink
    return middle - half, middle + half


def parse(given: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="class folders, or train/ and test/ of them"
    )
    parser.add_argument("--backbone", dest="backbones", action="append", required=True, metavar="ID[=FILE]")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"), metavar="DIR")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the folds")
    parser.add_argument("--allow-leaks", action="store_true", help="accept duplicates across given splits")
    parser.add_argument("--balanced", action="store_true", help="choose by and print balanced accuracy too")
    parser.add_argument("--best-only", action="store_true", help="test only the best by cross-validation")
    return parser.parse_args(None if given is None else list(given))


if __name__ == "__main__":
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
