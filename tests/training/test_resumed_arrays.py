"""Decoding and feature extraction that were killed go on with the images that are left."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tlauto.contracts import ImageInput, TrialSpec
from tlauto.data import Dataset, Item
from tlauto.plugins import Registry
from tlauto.training.batches import EVAL_BATCH
from tlauto.training.features import FeatureSource
from tlauto.training.pixels import BLOCK, load_pixels

DECODE = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from tlauto.contracts import ImageInput
    from tlauto.data import Dataset
    from tlauto.training.pixels import load_pixels

    dataset = Dataset.from_json(Path(sys.argv[1]).read_text())
    load_pixels(dataset, ["train"], ImageInput(size=8, resize=8), sys.argv[2])
    """
)


def test_killed_decoding_goes_on_with_the_images_that_are_left(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(BLOCK + 4)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(tmp_path / name)
    items = tuple(Item(name, 0, "train", f"sha{name}") for name in names)
    dataset = Dataset(str(tmp_path), "multiclass", ("a",), items, "fingerprint")
    (tmp_path / "dataset.json").write_text(dataset.to_json())
    stuck = tmp_path / names[BLOCK]
    stuck.unlink()
    os.mkfifo(stuck)  # whoever reads it waits forever
    words = [sys.executable, "-c", DECODE, str(tmp_path / "dataset.json"), str(tmp_path / "cache")]
    with subprocess.Popen(words) as process:
        wait_for_line(tmp_path / "cache" / "pixels", f"{BLOCK} ")
        process.kill()
    stuck.unlink()
    Image.new("RGB", (8, 8), (7, 0, 0)).save(stuck)
    for name in names[:BLOCK]:
        (tmp_path / name).unlink()  # they are not read again
    pixels = load_pixels(dataset, ["train"], ImageInput(size=8, resize=8), str(tmp_path / "cache"))
    reds = [int(pixels.windows([i])[0, 0, 0, 0]) for i in range(len(pixels))]
    assert reds == [*range(256), 7, 1, 2, 3]


def wait_for_line(folder: Path, start: str) -> None:
    """Wait until a journal in the folder has a line that begins so."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [line for file in folder.glob("*.journal") for line in file.read_text().splitlines()]
        if any(line.startswith(start) for line in lines):
            return
        time.sleep(0.02)
    raise AssertionError(f"no line '{start}…' in {folder}")


def test_features_go_on_after_the_last_complete_batch(
    spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    dataset = replace(dataset, items=tuple(item for item in dataset.items if item.split == "train") * 3)
    whole = features(spec, registry, dataset).clone()
    assert len(whole) == 72
    (path,) = Path(spec.cache, "features").glob("*.npy")
    leave_part(path, whole, rows=EVAL_BATCH)
    again = features(spec, registry, dataset)
    assert torch.equal(again[EVAL_BATCH:], whole[EVAL_BATCH:])
    assert bool((again[:EVAL_BATCH] == 5).all()), "what was complete is not computed again"


def features(spec: TrialSpec, registry: Registry, dataset: Dataset) -> torch.Tensor:
    source = FeatureSource(spec, registry, dataset, torch.device("cpu"))
    return source.features(["train"], "grid").parts[0]


def leave_part(path: Path, whole: torch.Tensor, *, rows: int) -> None:
    """Turn an array's files into those of a process killed after so many rows, all of value 5."""
    header = path.read_bytes()[: -whole.numel() * 2]
    data = header + np.full((rows, whole.shape[1]), 5, np.float16).tobytes()
    path.with_suffix(".part").write_bytes(data)
    facts = path.with_suffix(".json").read_text()
    path.with_suffix(".journal").write_text(f"{facts}\n{rows} {zlib.crc32(data):08x}\n")
    path.unlink()
