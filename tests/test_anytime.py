"""`bench/anytime.py` runs, keeps and reads results, hands the same networks to all, and counts right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contenders
import figures
import handed
import handover
import numpy as np
import pytest
import torch
from contenders import Result
from figures import Row
from tests_support import TINY, environment

from tlauto.contracts import WeightsOptions
from tlauto.data import load_dataset
from tlauto.plugins import registry

BENCH = Path(__file__).parents[1] / "bench"


def bench(*args: str, cwd: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, str(BENCH / args[0]), *args[1:]]
    env = {**contenders.torch_settings(), **environment(cwd)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_finished_results_are_kept_and_counted_with_later_ones(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    options = ("--data", "patches", "--time", "15", "--long-time", "0", "--no-pretrained", "--keep", "kept")
    options = ("anytime.py", *options, "--backbones", TINY[1], "--python", f"fastai={sys.executable}")
    first = bench(*options, "--only", "tlauto,script,fastai", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (line,) = [line for line in first.stdout.splitlines() if "skipped" in line and not line.startswith("{")]
    assert line.startswith("fastai") and f"{sys.executable} cannot import fastai" in line
    before = json.loads(first.stdout.splitlines()[-1])
    assert list(before["skipped"]) == ["fastai"]
    assert before["time_to_naive_score_ratio"] is None, "the loop lacks"
    assert before["time_to_script_ratio"] is None or before["time_to_script_ratio"] > 0

    second = bench(*options, "--only", "loop,random", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count(": kept from ") == 2
    (after,) = json.loads(second.stdout.splitlines()[-1])["rows"]
    assert list(after["results"]) == ["tlauto", "script", "loop", "random"]
    assert {name: after["results"][name] for name in ("tlauto", "script")} == before["rows"][0]["results"]
    _check_kept(sorted((tmp_path / "kept").iterdir()), tmp_path / "patches")


def _check_kept(files: list[Path], data: Path) -> None:
    assert [file.name.split("-")[1] for file in files] == ["loop", "random", "script", "tlauto"]
    dataset, _ = load_dataset(data, seed=0)
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))["result"]
        assert result["cpu_s"] > 0
        assert result["peak_mib"] is None or result["peak_mib"] > 100, "torch alone takes more"
        assert len(result["rows"]) == len(result["right"])
        for (seconds, _, test), right in zip(result["rows"], result["right"], strict=True):
            assert seconds > 0 and len(right) == len(dataset.part("test"))
            assert test == pytest.approx(right.count("1") / len(right))


def test_a_kept_result_serves_only_the_same_question(tmp_path: Path) -> None:
    facts = {"fingerprint": "f", "tested": "t", "backbones": ["a:b"], "data": "/data"}
    setting = contenders.Setting("data", 0, facts, "", None, True, ("--preset", "best"), {})
    known = Result([[1.0, 0.5, 1.0]], ["11"], 2.0, 3.0, None)
    file = tmp_path / f"{contenders._key('tlauto', setting, 300.0)}.json"
    contenders._keep(file, contenders._options("tlauto", setting, 300.0), known)

    def kept(name: str, budget: float, **changes: Any) -> Result | None:
        asked = contenders.Setting(**{**vars(setting), **changes})
        return contenders.kept_or_run(name, asked, budget, tmp_path, runs=False)

    assert kept("tlauto", 300.0) == known
    assert kept("tlauto", 300.0, weights_dir="/elsewhere", handed="x") == known, "the weights are in no path"
    for other in ({"seed": 1}, {"pretrained": False}, {"extra": ()}, {"facts": {**facts, "tested": "u"}}):
        assert kept("tlauto", 300.0, **other) is None
    assert kept("tlauto", 900.0) is None
    assert kept("loop", 300.0) is None


def test_scores_are_looked_up_by_time_and_times_by_score() -> None:
    curve = _result((5.0, 0.8), (9.0, 0.7), (20.0, 0.9))
    assert [figures.score_at(curve, at) for at in (4.0, 5.0, 10.0, 99.0)] == [None, 0.8, 0.7, 0.9]
    assert [figures.first_time(curve, score) for score in (0.75, 0.85, 0.95)] == [5.0, 20.0, None]


def _result(*points: tuple[float, float], whole_s: float = 0.0) -> Result:
    """A result with these seconds and test accuracies of ten images, the first ones right."""
    right = ["1" * round(10 * score) + "0" * round(10 - 10 * score) for _, score in points]
    return Result([[at, 0.5, score] for at, score in points], right, whole_s, 0.0, None)


def test_the_gain_is_over_the_best_alternative_at_that_time() -> None:
    rivals = {
        "script": _result((50.0, 0.7)),
        "loop": _result((290.0, 0.8), (310.0, 1.0)),
        "random": _result(),
    }
    row = Row("data", 0, "t", {"tlauto": _result((20.0, 0.5), (295.0, 0.9)), **rivals})
    found = figures.gain(row, "tlauto", 300.0)
    assert found is not None
    assert (found.other, found.ours, found.theirs, found.at) == ("loop", 0.9, 0.8, 300.0)
    np.testing.assert_array_equal(found.differences, [0] * 8 + [1, 0])
    # Whoever is a little late gives the others the same time.
    late = Row("data", 0, "t", {"tlauto": _result((312.0, 0.9)), **rivals})
    assert figures.gain(late, "tlauto", 300.0).theirs == 1.0  # type: ignore[union-attr]
    # AutoGluon has nothing before its own budget's end; the one with the longer budget is another run.
    gluon = {"autogluon": _result((340.0, 0.9)), "autogluon long": _result((990.0, 1.0))}
    patient = Row("data", 0, "t", {**row.results, **gluon})
    assert figures.gain(patient, "tlauto", 300.0).other == "autogluon"  # type: ignore[union-attr]
    assert figures.gain(Row("data", 0, "t", rivals), "tlauto", 300.0) is None


def test_the_interval_is_that_of_paired_differences_within_each_dataset() -> None:
    tenth = np.array([1.0] * 40 + [0.0] * 360)  # deviation 0.3, of the mean 0.015
    value, low, high = figures.interval([(1.0, tenth)])
    assert value == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.015, 0.1 + 1.96 * 0.015), abs=0.002)
    # Another dataset of the same size, where both are always right together, halves mean and deviation.
    value, low, high = figures.interval([(0.5, tenth), (0.5, np.zeros(400))])
    assert value == pytest.approx(0.05)
    assert (low, high) == pytest.approx((0.05 - 1.96 * 0.0075, 0.05 + 1.96 * 0.0075), abs=0.001)
    assert figures.interval([(1.0, np.zeros(50))]) == (0, 0, 0)


def test_seeds_share_the_weight_of_their_dataset() -> None:
    def gain(data: str, seed: int, tested: str, ours: float) -> figures.Gain:
        row = Row(data, seed, tested, {"tlauto": _result((9.0, ours)), "script": _result((9.0, 0.5))})
        found = figures.gain(row, "tlauto", 300.0)
        assert found is not None
        return found

    one, two = gain("a", 0, "same", 0.6), gain("a", 1, "same", 0.8)
    other, another = gain("b", 0, "x", 0.5), gain("b", 1, "y", 0.7)
    found = figures.strata([one, two, other, another])
    assert [weight for weight, _ in found] == [0.5, 0.25, 0.25]
    np.testing.assert_array_equal(found[0][1], [0] * 5 + [1, 0.5, 0.5, 0, 0])
    mean = figures.mean_gain([one, two, other, another])
    assert mean["value"] == pytest.approx((20 + 10) / 2)
    assert mean["low"] < mean["value"] < mean["high"]  # type: ignore[operator]
    assert figures.mean_gain([one, None])["value"] is None


def test_ratios_of_times_are_the_second_best_and_the_worst() -> None:
    def row(data: str, ours: Result, **others: Result) -> Row:
        return Row(data, 0, "t", {"tlauto": ours, **others})

    rows = [
        row("a", _result((10.0, 0.9)), loop=_result((100.0, 0.7), (600.0, 0.8), (700.0, 0.8))),
        row("b", _result((40.0, 0.9)), loop=_result((800.0, 0.9))),
        row("c", _result((20.0, 0.5)), loop=_result((800.0, 0.9))),
    ]
    assert figures.naive_ratio(rows) == pytest.approx(20.0), "of 60, 20 and never"
    assert figures.naive_ratio(rows[2:]) is None
    assert figures.naive_ratio([*rows, row("d", _result((1.0, 0.5)))]) is None, "one lacks the loop"
    longer = {**rows[2].results, "tlauto long": _result((400.0, 0.9))}
    assert figures.naive_ratio([Row("c", 0, "t", longer)]) == pytest.approx(2.0)

    script = _result((30.0, 0.6), (50.0, 0.8), whole_s=80.0)
    rows = [row("a", _result((20.0, 0.8)), script=script), row("b", _result((60.0, 0.9)), script=script)]
    assert figures.script_ratio(rows) == pytest.approx(60 / 80)
    assert figures.script_ratio([*rows, row("c", _result((9.0, 0.7)), script=script)]) is None


def test_a_dataset_of_few_images_is_always_the_same_with_the_whole_test_part(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    whole, _ = load_dataset(make_patches(tmp_path / "patches"), seed=0)
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(handover.place(f"{tmp_path / 'patches'}:5", tmp_path / name))
    assert made[0].read_text(encoding="utf-8") == made[1].read_text(encoding="utf-8")
    few, _ = load_dataset(made[0], seed=3)
    assert {item.sha256 for item in few.part("test")} == {item.sha256 for item in whole.part("test")}
    learned = [item.target for item in few.part("train", "val")]
    assert [learned.count(target) for target in range(3)] == [5, 5, 5]
    with pytest.raises(SystemExit, match="give 4 to"):
        handover.place(f"{tmp_path / 'patches'}:500", tmp_path)


def test_all_that_is_not_learned_from_can_be_tested(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    whole, _ = load_dataset(make_patches(tmp_path / "patches"), seed=0)
    some, _ = load_dataset(handover.place(f"{tmp_path / 'patches'}:5", tmp_path, test_rest=True), seed=3)
    learned, tested = ({item.sha256 for item in some.part(*parts)} for parts in (("train", "val"), ("test",)))
    assert len(learned) == 15
    assert learned.isdisjoint(tested)
    assert learned | tested == {item.sha256 for item in whole.items}


def test_of_images_with_several_labels_so_many_in_all_are_learned_from(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    files = sorted(make_patches(tmp_path / "patches").rglob("*.png"))
    names = [("a|b", "b", "a|c")[i % 3] for i in range(len(files))]
    lines = [f"{file},{name}" for file, name in zip(files, names, strict=True)]
    (tmp_path / "sets.csv").write_text("\n".join(["path,label", *lines]) + "\n", encoding="utf-8")
    manifest = handover.place(f"{tmp_path / 'sets.csv'}:12", tmp_path, test_rest=True)
    few, _ = load_dataset(manifest, seed=0)
    assert manifest.name == "sets-12.csv"
    assert few.task == "multilabel"
    assert len(few.part("train", "val")) == 12
    assert len(few.part("test")) == len(files) - 12
    labels = dict(zip(map(str, files), names, strict=True))
    for item in few.items:
        assert isinstance(item.target, tuple)
        assert "|".join(few.classes[i] for i in item.target) == labels[str(few.file(item))]


def test_networks_are_handed_over_as_the_search_loads_them(tmp_path: Path) -> None:
    ids, options = [TINY[1], "torchvision:squeezenet1_1"], WeightsOptions(pretrained=False)
    networks, left_out = handover.exported(ids, options, tmp_path)
    assert [network.id for network in networks] == ids and left_out == []
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    for network in networks:
        backbone = registry().provider(network.library).load(network.id, options)
        tensors = handed.build(network).state_dict()
        names = backbone.module.state_dict()
        assert len(tensors) == len(names)
        backbone.module.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
        backbone.set_training(False)
        with torch.inference_mode():
            built = handed.build(network).eval()(images)
            pooled = built if built.ndim == 2 else built.mean(dim=(2, 3))
            torch.testing.assert_close(pooled, backbone.pooled(images), rtol=1e-4, atol=1e-4)
    wrong = handed.Network(**{**vars(networks[0]), "file": networks[1].file})
    with pytest.raises(ValueError, match="the weights do not fit test_resnet"):
        handed.build(wrong)


@pytest.mark.parametrize("name", list(contenders.ELSEWHERE))
def test_scripts_of_other_environments_run_without_tlauto(
    name: str, tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    python = os.environ.get(f"{name.upper()}_PYTHON")
    if not python:
        pytest.skip(f"{name.upper()}_PYTHON names no interpreter of an environment with {name}")
    make_patches(tmp_path / "patches", per_class=100)  # lr_find takes 100 batches, in epochs of few
    # AutoGluon's timm is too old for timm's tiny models.
    networks = f"timm:mobilenetv2_050,{TINY[1]}" if name == "autogluon" else TINY[1]
    options = ("--no-pretrained", "--backbones", networks, "--offline", "--export", "--out", ".")
    assert bench("handover.py", "--data", "patches", *options, cwd=tmp_path).returncode == 0
    file = contenders.ELSEWHERE[name][0]
    done = bench(file, "--handed", "handed.json", "--time", "300", cwd=tmp_path, python=python)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    seconds, val, test = zip(*found["curve"], strict=True)
    assert list(seconds) == sorted(seconds) and list(val) == sorted(set(val))
    tested = len(json.loads((tmp_path / "handed.json").read_text())["parts"]["test"])
    assert [right.count("1") / tested for right in found["right"]] == pytest.approx(list(test))
