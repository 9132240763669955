"""What people do with fastai: `lr_find`, then `fine_tune`, one network after the other, until the time is up.

    python bench/handover.py --data DIR --out FOLDER --export --weights-dir DIR
    PYTHON bench/fastai_finetune.py --handed FOLDER/handed.json --time 900

PYTHON is the interpreter of an environment of its own, which needs no tlauto; `anytime.py` does both
steps when it is given one (`--python fastai=PYTHON`):

    python -m venv fastai-env && fastai-env/bin/python -m pip install -c constraints.txt fastai timm

Images are resized to the network's size and augmented by `aug_transforms()`, the head is fastai's own,
batches are of 32, all else is fastai's default: `lr_find()` with its valley, one epoch of the head,
`--epochs` of everything. The networks are taken in the order given; the next round has twice the
epochs. The model offered at a time is the best epoch by validation so far, which is kinder than waiting
for a fine-tuning's end. The last line of standard output is one JSON object: the number of fine-tunings,
and `curve`, a list of seconds (imports included, tests not), validation and test accuracy of each new best.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import handed
import torch
from curve import Clock, Curve
from torch import nn

try:
    # Both at once: fastai's callbacks expect the names of `vision.all` to be patched in.
    from fastai.callback.schedule import Learner  # type: ignore[import-not-found]
    from fastai.vision import all as fastai  # type: ignore[import-not-found]
except ImportError as error:
    sys.exit(f"error: this environment has no fastai ({error}); see {sys.argv[0]}")

BATCH = 32


class OutOfTime(Exception):
    """The time was up during a fine-tuning."""


class Watch(fastai.Callback):  # type: ignore[misc]
    """Ends a fit when the time is up, and offers the model after each epoch."""

    order = 70  # after the recorder, which has the validation score then

    def __init__(self, args: argparse.Namespace, curve: Curve, id: str, test: Any) -> None:
        self.args, self.curve, self.id, self.test = args, curve, id, test

    def after_batch(self) -> None:
        if self.curve.clock.now() > self.args.time:
            raise OutOfTime("the time is up")  # fastai reads its first argument

    def after_epoch(self) -> None:
        if hasattr(self.learn, "lr_finder") or self.curve.clock.now() > self.args.time:
            return
        val = float(self.learn.recorder.values[-1][-1])
        if self.curve.offer(val, lambda: right(self.learn.model, self.test)):
            seconds, val, test = self.curve.rows[-1]
            print(f"{seconds:7.0f} s  val {val:.3f}  test {test:.3f}  {self.id}", flush=True)


def main() -> None:
    args = parse()
    curve = Curve(Clock())
    given = handed.read(args.handed)
    if not given.networks:
        sys.exit(f"error: {args.handed} has no networks; make it with handover.py --export")
    fits = 0
    try:
        for network, epochs in rounds(given.networks, args.epochs):
            with tempfile.TemporaryDirectory() as folder:
                fit(network, epochs, given, args, curve, folder)
            fits += 1
    except OutOfTime:
        pass
    print(json.dumps({"fits": fits, "time": args.time, "networks": [n.id for n in given.networks],
                      **curve.facts()}))  # fmt: skip


def rounds(networks: tuple[handed.Network, ...], epochs: int) -> Iterator[tuple[handed.Network, int]]:
    """The networks in order, again and again, each round with twice the epochs."""
    while True:
        for network in networks:
            yield network, epochs
        epochs *= 2


def fit(
    network: handed.Network, epochs: int, given: handed.Handed, args: argparse.Namespace, curve: Curve,
    folder: str,
) -> None:  # fmt: skip
    """One network: a learning rate found, then a fine-tuning."""
    fastai.set_seed(args.seed)
    dls = loaders(network, given)
    test = dls.test_dl([path for path, _ in given.parts["test"]])
    targets = [target for _, target in given.parts["test"]]
    model, split = assemble(network, len(given.classes))
    learn = Learner(dls, model, splitter=split, metrics=fastai.accuracy, path=folder)
    learn.freeze()
    watch = Watch(args, curve, network.id, (test, targets))
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([watch]):
        found = learn.lr_find(show_plot=False)
        learn.fine_tune(epochs, base_lr=found.valley)


def loaders(network: handed.Network, given: handed.Handed) -> Any:
    """fastai's loaders of the given split."""
    classes = dict([*given.parts["train"], *given.parts["val"]])
    learned = len(given.parts["train"])
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock(vocab=list(range(len(given.classes))))),
        get_y=lambda path: classes[path],
        splitter=lambda files: (list(range(learned)), list(range(learned, len(files)))),
        item_tfms=fastai.Resize(network.size),
        batch_tfms=[*fastai.aug_transforms(), fastai.Normalize.from_stats(network.mean, network.std)],
    )
    return block.dataloaders(list(classes), bs=max(2, min(BATCH, learned // 2)))


def assemble(network: handed.Network, classes: int) -> tuple[nn.Module, Any]:
    """What `vision_learner` builds, but with our weights: body, fastai's head, and how they are split."""
    if network.library == "timm":
        model, _ = fastai.create_timm_model(network.arch, classes, pretrained=False, **network.kwargs)
        model[0].model = handed.build(network)
        return model, fastai.default_split
    import torchvision

    body = handed.build(network)
    channels = fastai.num_features_model(body)
    meta = fastai.model_meta.get(getattr(torchvision.models, network.arch), {})
    return fastai.add_head(body, channels, classes), meta.get("split", fastai.default_split)


@torch.inference_mode()
def right(model: nn.Module, test: Any) -> list[bool]:
    """Which test images are answered right, in the split's order."""
    loader, targets = test
    model.eval()
    answers = [int(answer) for batch in loader for answer in model(batch[0]).argmax(dim=1)]
    return [answer == target for answer, target in zip(answers, targets, strict=True)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--handed", required=True, metavar="FILE", help="what handover.py wrote")
    parser.add_argument("--time", type=float, default=900.0, help="seconds")
    parser.add_argument("--epochs", type=int, default=4, help="of the first round's fine-tunings")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
