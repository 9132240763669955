"""The scripts of bench/ run, see the same images as tlauto, and count right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import augment
import numpy as np
import probe_script
import pytest
import search_vs_probe
import torch
from tests_support import TINY, environment

from tlauto import metrics
from tlauto.contracts import ImageInput, WeightsOptions
from tlauto.data import load_dataset
from tlauto.plugins import registry
from tlauto.recipe import AUGMENT_LEVELS
from tlauto.training.batches import normalise
from tlauto.training.pixels import centre_crop, decode

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "bench"


def script(name: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / name), *args]
    env = environment(cwd)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_a_search_is_compared_with_the_script(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    options = ("--trials", "2", "--no-pretrained", "--preset", "fast", "--backbones", TINY[1])
    done = script("search_vs_probe.py", "--data", "patches", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    (run,) = json.loads(last)["runs"]
    assert (
        lines[-1].startswith("| patches | ")
        and lines[-1].count("|") == search_vs_probe.HEADER.count("|") // 2
    )
    dataset, _ = load_dataset(tmp_path / "patches", seed=0)
    assert run["test_images"] == len(dataset.part("test"))
    assert run["probe"]["backbone"] == TINY[1]
    for accuracy in (run["search"]["accuracy"], run["probe"]["test"]["accuracy"]):
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    assert not (tmp_path / "tlauto-runs").exists(), "it works in a folder of its own"


def test_the_script_tests_only_the_best_backbone_if_asked(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    backbones = ("--backbone", TINY[1], "--backbone", "timm:test_vit.r160_in1k")
    done = script(
        "probe_script.py", "--data", "patches", "--no-pretrained", "--best-only", "--balanced", *backbones,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tested = [result["backbone"] for result in found["backbones"] if "test" in result]
    assert tested == [found["best"]["backbone"]]
    assert found["best"]["cv"] == max(result["cv"] for result in found["backbones"])
    assert set(found["best"]["test"]) == {"accuracy", "balanced_accuracy"}


def test_partial_trials_are_timed_with_and_without_the_cache(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    options = ("--no-pretrained", "--backbone", TINY[1], "--epochs", "2", "--rounds", "1")
    done = script("partial.py", "--data", "patches", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (row,) = found["rows"]
    assert found["partial_cache_speedup"] == row["speedup"] > 0
    assert row["cache_bytes"] > 0
    assert all(
        0 <= row[way]["score"] <= 1 and row[way]["epoch_s"] > 0 for way in ("without", "first", "next")
    )


def test_batched_augmentation_is_timed_against_one_image_at_a_time(tmp_path: Path) -> None:
    options = ("--quick", "--backbone", TINY[1], "--images", "24", "--batch", "8", "--threads", "2")
    done = script("augment.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert tuple(found["augment_speedup"]) == AUGMENT_LEVELS
    for row in found["rows"]:
        assert row["batched"] / row["per_image"] == row["speedup"] == found["augment_speedup"][row["level"]]
        assert 0 < row["share"] < 1
    assert found["augment_share"] == max(row["share"] for row in found["rows"])
    assert (found["device"], found["threads"], found["batch"]) == ("cpu", 2, 8)


@pytest.mark.parametrize("level", AUGMENT_LEVELS)
def test_both_ways_of_augmenting_give_images_of_the_same_kind(level: str, tmp_path: Path) -> None:
    image_input = ImageInput(size=32, resize=36)
    windows = augment.write_windows(tmp_path / "windows.npy", image_input, 8)
    batches, device = [[0, 1, 2], [3, 4, 5], [6, 7]], torch.device("cpu")
    before = torch.get_num_threads()
    transform = augment.tutorial(level, image_input)
    ours = list(augment.batched(level, windows, batches, image_input, device))
    theirs = list(augment.per_image(transform, windows, batches, device))
    assert torch.get_num_threads() == before
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if level == "none":
            assert torch.allclose(one, other, atol=1e-5)


def test_without_data_it_says_what_to_give(tmp_path: Path) -> None:
    done = script("search_vs_probe.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "give --data DIR or set TLAUTO_BENCH_DATA" in done.stderr


@pytest.mark.parametrize(
    "id", ["timm:test_resnet.r160_in1k", "torchvision:squeezenet1_1", "keras:MobileNet-0.25-128",
           "efficientnet-lite:lite0"],
)  # fmt: skip
def test_the_scripts_features_are_those_of_a_search(id: str, tmp_path: Path, patches: Any) -> None:
    files = sorted(str(file) for file in (patches(per_class=2, size=301) / "red").iterdir())
    backbone = registry().provider(id.partition(":")[0]).load(id, WeightsOptions(pretrained=False))
    theirs = probe_script.features(backbone.module, files, probe_script.transform(id, backbone))
    crops = [torch.from_numpy(centre_crop(decode(Path(f), backbone.input), backbone.input)) for f in files]
    images = normalise(torch.stack(crops).permute(0, 3, 1, 2), backbone.input, torch.device("cpu"))
    backbone.set_training(False)
    with torch.no_grad():
        np.testing.assert_allclose(backbone.pooled(images).numpy(), theirs, rtol=1e-3, atol=1e-4)


def test_the_scripts_interval_is_that_of_a_search() -> None:
    targets, answers = np.zeros(153, dtype=int), np.eye(2)[np.array([0] * 143 + [1] * 10)]
    ours = metrics.compute_all("multiclass", targets, answers, intervals=True)["accuracy"]
    assert probe_script.wilson(143, 153) == pytest.approx((ours["low"], ours["high"]), abs=1e-4)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # His example (a): 56 of 70 against 48 of 80 gives 0.0524 to 0.3339 by method 10.
    sides = []
    for correct, total in ((56, 70), (48, 80)):
        low, high = probe_script.wilson(correct, total)
        sides.append({"value": correct / total, "low": low, "high": high})
    found = search_vs_probe.difference(*sides)
    assert found["value"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_head_trials_are_timed_against_a_forward_pass(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    done = script(
        "heads.py", "--data", "patches", "--no-pretrained", "--trials", "3", "--rounds", "2",
        "--backbone", TINY[1],
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["trials"], figures["rounds"]) == (3, 2)
    assert figures["heads_per_forward"] > 0
    assert figures["forward_s"] > 0
    assert not (tmp_path / "tlauto-runs").exists(), "it works in a folder of its own"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "finetune"])
def test_ways_to_wait_are_compared(kind: str, tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    done = script(
        "waiting.py", "--kind", kind, "--quick", "--data", "patches", "--no-pretrained",
        "--backbone", TINY[1],
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kind"] == kind
    assert (figures["sleep_alone"], figures["sleep_beside"], figures["rounds"]) == (1, 1, 1)
    assert all(figures[f"{way}_{where}"] > 0 for way in ("1000", "5000") for where in ("alone", "beside"))


def test_bounds_of_feature_scaling_are_compared_on_held_out_folds(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    done = script(
        "feature_scaling.py", "--data", "patches", "--no-pretrained", "--backbone", TINY[1], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    bounds, kinds = ("0.001", "0.1", "0.3", "0.5", "1", "3"), ("pooled", "levels", "grid")
    assert set(losses) == {f"loss_{kind}_{bound}" for kind in kinds for bound in bounds}
    assert all(0 <= loss < 2 for loss in losses.values())


def test_the_plain_loop_offers_its_best_models_over_time(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    done = script(
        "naive_optuna.py", "--data", "patches", "--no-pretrained", "--time", "12", "--backbone", TINY[1],
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"] >= 2
    seconds, val, test = zip(*found["curve"], strict=True)
    assert list(seconds) == sorted(seconds) and seconds[-1] <= 12
    assert list(val) == sorted(set(val)), "each is better than the one before"
    assert all(0 <= score <= 1 for score in test)


def test_time_and_memory_are_measured_against_images_classes_and_trials(tmp_path: Path) -> None:
    sizes = ("--images", "24", "60", "--classes", "2", "4", "--class-images", "24", "--trials", "2", "3")
    options = ("--base-trials", "2", "--few", "2", "--quick")
    done = script("scale.py", *sizes, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    runs = {(run["images"], run["classes"], run["trials"]): run for run in found["runs"]}
    assert set(runs) == {(24, 2, 2), (60, 2, 2), (24, 4, 2), (24, 2, 3)}
    for run in runs.values():
        assert run["worker"] > run["coordinator"] > 10
        assert run["together"] <= run["worker"] + run["coordinator"] + 1e-6
        assert sum(run["stages"].values()) == pytest.approx(run["seconds"])
        assert set(run["stages"]) == {"data", "start", "trials", "finish"}
    first, last = runs[24, 2, 2], runs[60, 2, 2]
    assert found["memory_growth"] == pytest.approx(last["together"] / first["together"])
    per_image = (last["coordinator"] - first["coordinator"]) / 0.036
    assert found["slopes"]["images"]["coordinator"] == pytest.approx(per_image)
    assert not (tmp_path / "tlauto-runs").exists(), "it works in a folder of its own"


def test_samplers_are_compared_on_spaces_whose_best_point_is_known(tmp_path: Path) -> None:
    done = script("sampling.py", "--quick", "--seeds", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("tlauto", "optuna", "random"):
        assert 0 < found[f"{name}_100"] <= found[f"{name}_30"], "the best so far only gets better"
    assert found["tlauto_100"] < found["random_100"]
    assert found["less_30"] == pytest.approx(found["optuna_30"] - found["tlauto_30"], abs=2e-4)
