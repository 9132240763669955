"""Whatever is wrong with what the user gives: one clear sentence, the right exit code, no traceback.

Every case goes through the real command line. Exit code 1 is an error of ours, 2 is wrong usage.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests_support import SPOILED, TINY, environment, refused, run

MODEL = "timm:test_resnet.r160_in1k"
PRETRAINED = ("--backbones", MODEL, "--offline", "--preset", "fast")


def search(
    *args: str, cwd: Path, code: int = 1, data: str = "images", env: dict[str, str] | None = None
) -> str:
    """The sentence with which a quiet search ends, which then is the only line."""
    return refused("search", "--data", data, *args, "--quiet", cwd=cwd, code=code, env=env)


# --- the dataset ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Path:
    """A folder with good images, all kinds of bad datasets, and no workspace."""
    folder = tmp_path_factory.mktemp("place")
    make_patches(folder / "images", per_class=4, classes=2)
    (folder / "empty").mkdir()
    make_patches(folder / "one", per_class=4, classes=1)
    make_patches(folder / "few", per_class=2, classes=2)
    for name, spoil in SPOILED.items():
        for file in sorted(make_patches(folder / name, per_class=4, classes=2).rglob("*.png")):
            spoil(file)
    shutil.copytree(folder / "images", folder / "leak" / "train")
    shutil.copytree(folder / "images", folder / "leak" / "test")
    shutil.copy(folder / "images/red/red000.png", folder / "photo.png")
    (folder / "file").write_text("not a folder")
    for name, text in MANIFESTS.items():
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


RED, GREEN = "images/red/red000.png", "images/green/green000.png"
MANIFESTS: dict[str, str | bytes] = {
    "empty.csv": "",
    "header.csv": "path,label\n",
    "headless.csv": f"{RED},red\n{GREEN},green\n",
    "unlabelled.csv": f"path\n{RED}\n{GREEN}\n",
    "gone.csv": f"path,label\n{RED},red\nimages/blue/blue000.png,blue\n",
    "torn.csv": f"path,label\n{RED},red\n{GREEN}\n",
    "quoted.csv": f'path,label\n"{RED},red\n',
    "twice.csv": f"path,label\n{RED},red\n{RED},green\n",
    "blank.csv": f"path,label\n{RED},red\n{GREEN},\n",
    "split.csv": f"path,label,split\n{RED},red,tset\n",
    "latin.csv": b"path,label\nimages/red/red000.png,caf\xe9\n",
    "broken.jsonl": '{"path": "images/red/red000.png", "label": \n',
    "notes.txt": "path,label\n",
}

DATASETS = {
    "an empty path": ("", "path is empty", "--data PATH"),
    "a missing path": ("nowhere", "/nowhere'", "check the path"),
    "an empty folder": ("empty", "/empty'", "one folder of images per class"),
    "one class": ("one", "one class only, 'red'", "add images"),
    "classes too small": ("few", "'green' (2), 'red' (2)", "add images"),
    "zero-byte files": ("zero", "none of the 8 images", "empty file (0 bytes)", "tlauto doctor"),
    "text named .jpg": ("text", "none of the 8 images", "text, not an image", "tlauto doctor"),
    "truncated JPEGs": ("truncated", "none of the 8 images", ".jpg': truncated", "tlauto doctor"),
    "noise named .png": ("noise", "none of the 8 images", "green/green000.png'", "tlauto doctor"),
    "leaks across given splits": ("leak", "8 groups of identical images", "--allow-leaks"),
    "a single image": ("photo.png", "one image", "pass a folder"),
    "a file that is no manifest": ("notes.txt", "notes.txt' is not a dataset", ".csv"),
    "an empty CSV": ("empty.csv", "empty.csv' is empty", "header line such as path,label"),
    "a CSV with a header only": ("header.csv", "header.csv' has a header and no rows", "add one row"),
    "a CSV without a header": (
        "headless.csv",
        "headless.csv' has no header",
        "put a line such as path,label",
    ),
    "a CSV without labels": ("unlabelled.csv", "has no label column, only path", "add one named label"),
    "a label for a missing file": (
        "gone.csv",
        "'images/blue/blue000.png' (gone.csv line 3)",
        "remove the rows",
    ),
    "a CSV row too short": ("torn.csv", "torn.csv line 3", "1 cell where the header has 2"),
    "an open quote in a CSV": ("quoted.csv", "quoted.csv' line 2 is not CSV"),
    "one image with two labels": (
        "twice.csv",
        "'images/red/red000.png' is listed twice",
        "join several labels",
    ),
    "an empty label": ("blank.csv", "blank.csv line 3: the label is empty", "remove the row"),
    "an unknown split": ("split.csv", "split.csv line 2: the split is 'tset'", "train, val or test"),
    "a CSV that is not UTF-8": ("latin.csv", "latin.csv' is not UTF-8", "save it again"),
    "broken JSON lines": ("broken.jsonl", "broken.jsonl line 1", "is not JSON"),
}


@pytest.mark.parametrize("case", DATASETS)
def test_an_unusable_dataset_is_named_with_its_cure(place: Path, case: str) -> None:
    data, *said = DATASETS[case]
    sentence = search(*TINY, cwd=place, data=data)
    assert all(text in sentence for text in said), sentence


def test_a_missing_column_is_named_with_those_there_are(place: Path) -> None:
    sentence = search(*TINY, "--label-column", "lable", cwd=place, data="twice.csv")
    assert "no column 'lable'" in sentence and "did you mean 'label'?" in sentence


def test_the_doctor_says_what_a_search_would(place: Path) -> None:
    done = run("doctor", "truncated", cwd=place)
    assert done.returncode == 1
    assert done.stderr.startswith("error: none of the 8 images") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout


# --- what is asked of a search ------------------------------------------------------------------------

WISHES = {
    "an unknown strategy": (("--strategies", "ful"), "'ful'", "did you mean 'full'?"),
    "an unknown head": (("--heads", "liner"), "'liner'", "did you mean 'linear'?"),
    "an unknown metric": (("--metric", "acuracy"), "'acuracy'", "did you mean 'accuracy'?"),
    "a metric of another task": (("--metric", "rmse"), "'rmse'", "choose from accuracy"),
    "a task that the labels do not fit": (("--task", "regression"), "'green'", "--task"),
    "an unknown provider": (("--backbones", "tim:resnet18"), "'tim'", "did you mean 'timm'?"),
    "negative trials": (("--trials", "-3"), "--trials must be at least 1, not -3"),
    "a time in words": (("--time", "soon"), "'soon' is not a duration", "30m"),
    "no time": (("--time", "0s"), "'0s' must be more than zero"),
    "an empty time": (("--time", ""), "'' is not a duration", "30m"),
    "negative workers": (("--workers", "-1"), "--workers must be from 0 to 512, not -1"),
    "a negative seed": (("--seed", "-1"), "--seed must be from 0", "not -1"),
    "an unknown kind of device": (("--devices", "gpu"), "'gpu'", "auto, cpu, mps or cuda:N"),
    "a device that is not there": (("--devices", "cuda:7"), "cuda:7", "use --devices auto or cpu"),
    "devices of several kinds": (("--devices", "cpu,cuda:0"), "cpu,cuda:0", "name GPUs only"),
    "slots on a GPU that is not used": (
        ("--devices", "cpu", "--per-device", "2"),
        "NVIDIA GPUs",
        "--workers",
    ),
    "no slots on a GPU": (("--per-device", "0"), "--per-device must be auto or from 1 to 16, not 0"),
    "an unknown parameter": (("--set", "optim.adamw.rl=1"), "'optim.adamw.rl'", "'optim.adamw.lr'?"),
    "a parameter out of range": (("--set", "optim.adamw.lr=7"), "optim.adamw.lr: 7 is outside"),
    "a parameter of the wrong kind": (("--set", "optim.adamw.lr=fast"), "'fast' is not a number"),
    "a parameter without value": (("--set", "optim.name"), "'optim.name' is not NAME=VALUE", "example"),
    "a backbone as a parameter": (("--set", f"backbone={MODEL}"), f"use --backbones {MODEL}"),
    "a study name that is a path": (("--study", "../mine"), "'../mine'", "letters, digits"),
    "an unwritable workspace": (("--out", "file/runs"), "/file/runs: Not a directory", "--out"),
    "a storage that is no URL": (("--storage", "nonsense"), "'nonsense'", "sqlite:////folder/tlauto.db"),
    "a storage in no folder": (
        ("--storage", "sqlite:///no/x.db"),
        "no/x.db: unable to open",
        "check the path",
    ),
    "a missing weights file": (("--weights", f"{MODEL}=no.pth"), "'no.pth'", "check the path"),
    "weights without provider": (("--weights", "resnet18=photo.png"), "'resnet18'", "timm:resnet18=FILE"),
    "weights of an unknown provider": (("--weights", "tim:x=photo.png"), "'tim'", "did you mean 'timm'?"),
    "a missing weights folder": (("--weights-dir", "nodir"), "/nodir' does not exist", "--weights-dir"),
}


@pytest.mark.parametrize("case", WISHES)
def test_an_impossible_wish_is_refused_before_any_worker_starts(place: Path, case: str) -> None:
    flags, *said = WISHES[case]
    base = PRETRAINED if flags[0] == "--weights" else TINY
    sentence = search(*base, *flags, cwd=place)
    assert all(text in sentence for text in said), sentence
    assert not list(place.glob("tlauto-runs/*/logs"))


def test_weights_and_random_initialisation_exclude_each_other(place: Path) -> None:
    assert "leave one out" in search(*TINY, "--weights", f"{MODEL}=photo.png", cwd=place)


USAGES = {
    "an unknown command": (("serch",), "'serch'"),
    "an unknown option": (("search", "--dta", "images"), "'--dta'", "'--data'"),
    "trials in words": (("search", "--trials", "many"), "'--trials': 'many'"),
    "an unknown preset": (("search", "--preset", "quick"), "'quick'", "'fast', 'balanced', 'best'"),
    "an unknown task": (("search", "--task", "detection"), "'detection'", "'multiclass'"),
    "both --resume and --new": (("search", "--data", "images", "--resume", "--new"), "--resume and --new"),
    "no backbone at all": (("search", "--backbones", ","), "'--backbones'", "at least one"),
    "weights without a path": (("search", "--weights", MODEL), f"'{MODEL}' is not ID=PATH", "example"),
    "a port out of range": (("dashboard", "--port", "99999"), "99999"),
    "nothing to predict": (("predict", "model"), "'PATH...'"),
    "a trial that is no number": (("rerun", "images", "best"), "'best'"),
    "an unknown part": (("evaluate", "model", "--data", "images", "--split", "train"), "'train'", "'test'"),
}


@pytest.mark.parametrize("case", USAGES)
def test_wrong_usage_exits_with_2(place: Path, case: str) -> None:
    args, *said = USAGES[case]
    sentence = refused(*args, cwd=place, code=2)
    assert all(text in sentence for text in said), sentence


def test_a_search_needs_a_dataset(place: Path) -> None:
    assert "--data PATH" in refused("search", cwd=place)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("oops = [", "tlauto.toml: "),
        ("[search]\ntrails = 3", "unknown setting 'trails'; did you mean 'trials'?"),
        ('[search]\ntrials = "many"', "'trials' is 'many'"),
        ("[search]\nbackbones = 3", "'backbones' is 3"),
        ("[serch]\ntrials = 3", "unknown table 'serch'; settings stand under [search]"),
        ("search = 3", "'search' is 3; write a table"),
    ],
)
def test_a_wrong_settings_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tlauto.toml").write_text(text)
    sentence = search(*TINY, cwd=tmp_path)
    assert f"{tmp_path}/tlauto.toml" in sentence and said in sentence, sentence


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TLAUTO_PLUGINS", "absent", "'absent', which is not an installed plugin (installed: "),
        (
            "TLAUTO_WEIGHTS",
            "/no/weights",
            "'/no/weights' does not exist; give --weights-dir (or TLAUTO_WEIGHTS)",
        ),
        (
            "TLAUTO_CACHE",
            "file/cache",
            "cache file/cache: Not a directory; choose another folder with TLAUTO_CACHE",
        ),
        ("TLAUTO_CACHE_SIZE", "lots", "TLAUTO_CACHE_SIZE: 'lots' is not a size; write for example 20GB"),
    ],
)
def test_a_wrong_environment_variable_is_named(place: Path, variable: str, value: str, said: str) -> None:
    assert said in search(*TINY, cwd=place, env={variable: value})


# --- backbones and weights: found by a worker, before the first trial ----------------------------------


@pytest.fixture(scope="module")
def weights(place: Path) -> Path:
    """Weights files that do not fit."""
    save_file({"conv.weight": torch.zeros(3, 3)}, place / "other.safetensors")
    (place / "damaged.safetensors").write_bytes(os.urandom(2000))
    torch.save({"model": Path("/tmp")}, place / "pickled.pth")
    return place


BACKBONES = {
    "an unknown backbone": (("--backbones", "timm:resnt18"), "'resnt18'", "did you mean 'resnet18'?"),
    "a glob without match": (("--backbones", "timm:nosuch*"), "'timm:nosuch*'", "tlauto backbones"),
    "missing weights without network": (
        ("--backbones", MODEL, "--weights-dir", "images"),
        f"the weights of {MODEL} are not in", "/images/timm", "--offline", f"'tlauto weights fetch {MODEL}'",
    ),
    "weights of another architecture": (
        ("--backbones", MODEL, "--weights", f"{MODEL}=other.safetensors"),
        f"'other.safetensors' does not hold weights of {MODEL}", "'conv.weight'", "give the file of",
    ),
    "corrupt weights": (
        ("--backbones", MODEL, "--weights", f"{MODEL}=damaged.safetensors"),
        "'damaged.safetensors' cannot be read", "get the file again",
    ),
    "weights that would run code": (
        ("--backbones", MODEL, "--weights", f"{MODEL}=pickled.pth"),
        "'pickled.pth' cannot be read", "never loaded", "best as .safetensors",
    ),
    "weights of an unknown backbone": (
        ("--weights", "timm:test_rsnet=other.safetensors"), "'test_rsnet'", "did you mean 'test_resnet'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BACKBONES)
def test_a_wrong_backbone_or_weights_file_is_named_before_any_trial(weights: Path, case: str) -> None:
    flags, *said = BACKBONES[case]
    sentence = search(*flags, "--offline", cwd=weights)
    assert all(text in sentence for text in said), sentence
    with closing(sqlite3.connect(weights / "tlauto-runs" / "tlauto.db")) as database:
        assert database.execute("SELECT count(*) FROM tlauto_searches").fetchone() == (0,)


# --- other commands -------------------------------------------------------------------------------------

OTHERS = {
    "demo data into used folder": (("demo-data", "images"), "'images' holds other files", "empty or new"),
    "demo data into a file": (("demo-data", "file"), "'file' is a file", "choose a folder"),
    "the doctor on nothing": (("doctor", "nowhere"), "'nowhere'", "check the path"),
    "backbones of no provider": (("backbones", "tim:*"), "'tim'", "'tlauto plugins'"),
    "weights of no provider": (("weights", "fetch", "tim:resnet18"), "'tim'", "did you mean 'timm'?"),
    "weights of what is no id": (("weights", "fetch", "resnet18"), "'resnet18'", "timm:resnet18"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_other_commands_refuse_in_one_sentence_as_well(place: Path, case: str) -> None:
    args, *said = OTHERS[case]
    sentence = refused(*args, cwd=place)
    assert all(text in sentence for text in said), sentence


# --- the machine --------------------------------------------------------------------------------------

STARVED = """
import resource
from pathlib import Path
import tlauto.cli
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + {more} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
tlauto.cli.main(["search", "--data", "images"])
"""
"""`tlauto` with little memory for what it has yet to import."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its size in /proc")
@pytest.mark.parametrize("more", [0, 16, 24, 100])
def test_a_machine_without_memory_for_another_library_is_a_sentence(tmp_path: Path, more: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARVED.format(more=more)], cwd=tmp_path, env=environment(tmp_path),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: no memory is left; end other programs, or use fewer --workers\n"


FAILED_IN_C = """
import resource
from pathlib import Path
import tlauto.cli

def fail(**_):
    raise SystemError("error return without exception set")

tlauto.cli.app.main = fail
pages = int(Path("/proc/self/statm").read_text().split()[0])
if {is_starved}:
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
tlauto.cli.main([])
"""
"""What Python's import raised in a search without memory; who has memory is to see where it comes from."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its size in /proc")
@pytest.mark.parametrize("is_starved", [True, False])
def test_a_failure_that_python_cannot_name_is_a_sentence_only_without_memory(is_starved: bool) -> None:
    code = FAILED_IN_C.format(is_starved=is_starved)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = "error: no memory is left; end other programs, or use fewer --workers\n"
    assert (done.stderr == said) is is_starved
    assert ("Traceback" in done.stderr) is not is_starved


LATE = """
import os, signal, tlauto.cli
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
        kill(pid, number)
late = Late()
tlauto.cli.main(["--version"])
"""
"""`tlauto` that meets Ctrl-C after its last line, while Python clears up."""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_after_the_last_line_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE], cwd=tmp_path, env=environment(tmp_path), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tlauto, version")
