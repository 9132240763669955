from __future__ import annotations

from pathlib import Path

import pytest

from tlauto.config import SearchConfig, differences, parse_params, parse_seconds, resolve
from tlauto.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800)],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10 parsecs", "0", "-5m", "5x"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"duration|more than zero"):
        parse_seconds(text)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "tlauto.toml").write_text(
        '[search]\ntrials = 7\nseed = 3\nbackbones = "timm:a,timm:b"\ntime = "2m"\ncold = true\n'
        'trial-timeout = "5m"\nmax-failures = 3\n'
    )
    config = resolve({"data": "images", "trials": 9, "seed": None}, folder=tmp_path)
    assert (config.trials, config.seed, config.preset) == (9, 3, "balanced")
    assert config.backbones == ("timm:a", "timm:b")
    assert (config.time_s, config.cold) == (120, True)
    assert (config.trial_timeout_s, config.max_failures) == (300, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[search]\ntrails = 3", "did you mean 'trials'"),
        ("[serach]\ntrials = 3", "unknown table"),
        ("[search]\ntrials = 'many'", "not the kind of value"),
        ("[search\n", "cannot read"),
    ],
)
def test_a_wrong_settings_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tlauto.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve({"data": "images"}, folder=tmp_path)


def test_slots_on_a_gpu_are_a_number_or_auto(tmp_path: Path) -> None:
    for text, expected in (("2", "2"), ("'auto'", "auto")):
        (tmp_path / "tlauto.toml").write_text(f"[search]\nper-device = {text}")
        assert resolve({"data": "images"}, folder=tmp_path).per_device == expected
    assert resolve({"data": "images", "per_device": 3}, folder=tmp_path).per_device == "3"


@pytest.mark.parametrize(
    "values",
    [
        {"trials": 0},
        {"trials": -3},
        {"time_s": -1.0},
        {"trial_timeout_s": 0.0},
        {"max_failures": 0},
        {"workers": -1},
        {"per_device": "0"},
        {"per_device": "many"},
        {"seed": -1},
        {"study": "../escape"},
        {"preset": "huge"},
        {"task": "segmentation"},
        {"weights_dir": "/does/not/exist"},
        {"weights": {"timm:resnet18": "/does/not/exist.pth"}},
        {"weights": {"resnet18": __file__}},
    ],
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SearchConfig(data="images", **values)  # type: ignore[arg-type]


def test_a_config_survives_json() -> None:
    config = SearchConfig(data="images", backbones=("timm:a",), params={"optim.name": "sgd"}, time_s=3.5)
    assert SearchConfig.from_json(config.to_json()) == config


def test_budgets_and_what_is_searched_may_change_on_resume_but_no_other_setting() -> None:
    old = SearchConfig(data="images", trials=10)
    assert differences(old, SearchConfig(data="images", trials=20, workers=2)) == []
    assert "seed was 0 and is now 1" in differences(old, SearchConfig(data="images", seed=1))
    named = SearchConfig(data="images", backbones=("timm:a",), heads=("mlp",))
    assert differences(old, named) == []
    assert (
        differences(named, SearchConfig(data="images", backbones=("timm:a", "timm:b"), heads=("mlp",))) == []
    )
    assert differences(named, SearchConfig(data="images", heads=("mlp",))) == [
        "backbones was timm:a and is now not set"
    ]


def test_fixed_parameters_keep_their_kinds() -> None:
    assert parse_params(("a.b=1", "c=0.5", "d=true", "e=sgd", "f=null")) == {
        "a.b": 1, "c": 0.5, "d": True, "e": "sgd", "f": None,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_params(("oops",))
