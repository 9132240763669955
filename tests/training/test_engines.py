"""Engines of frozen backbones: equal features, a choice that is always the same, and a way out."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tests_support import environment

from tlauto.caches import clear, entries
from tlauto.contracts import Backbone, TrialSpec, WeightsOptions
from tlauto.data import Dataset
from tlauto.plugins import Registry, load_plugins
from tlauto.training.engines import CONVERTERS, Extractor, FrozenFeatures, folded, measure_work, same_features
from tlauto.training.features import FeatureSource
from tlauto.training.model import Kind, features_of

OPENVINO, ONNX = CONVERTERS
RESNET = "timm:test_resnet.r160_in1k"
BACKBONES = (
    RESNET, "timm:test_efficientnet.r160_in1k", "timm:test_vit.r160_in1k",
    "torchvision:squeezenet1_1.IMAGENET1K_V1", "keras:MobileNet", "efficientnet-lite:lite0",
)  # fmt: skip
CPU = torch.device("cpu")
MANY = 10**7  # images: whatever the conversion costs, it pays


@cache
def load(id: str) -> Backbone:
    """A frozen backbone, with random weights where none come with a package."""
    provider = id.partition(":")[0]
    torch.manual_seed(0)
    options = WeightsOptions(offline=True, pretrained=provider == "efficientnet-lite")
    backbone = load_plugins().provider(provider).load(id, options)
    backbone.set_trainable(())
    backbone.set_training(False)
    for name, buffer in backbone.module.named_buffers():
        # Statistics of 0 and 1 would hide a BatchNorm that is folded wrongly.
        if "running_" in name and not options.pretrained:
            buffer.uniform_(*((-0.3, 0.3) if "mean" in name else (0.5, 1.5)))
    return backbone


def images(backbone: Backbone, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    side = backbone.input.size
    return torch.randn(count, 3, side, side, generator=generator).to(memory_format=torch.channels_last)


def extractor(folder: Path, *, id: str = RESNET, kind: Kind = "pooled", count: int = MANY) -> Extractor:
    """An extractor whose notes are in `extractor.note.__self__`."""
    return Extractor(
        load(id), kind, CPU, images=count, weights="hash", folder=folder, note=[].append,
        about={"backbone": id},
    )  # fmt: skip


def notes(run: Extractor) -> list[str]:
    return run.note.__self__  # type: ignore[attr-defined,no-any-return]


def assert_equal_features(run: Callable[[torch.Tensor], torch.Tensor], id: str, kind: Kind) -> None:
    """Two orders below the bound that the choice allows, for one image and for several."""
    backbone = load(id)
    with torch.inference_mode():
        for count in (1, 3):
            expected = features_of(backbone, images(backbone, count), kind)
            found = run(images(backbone, count))
            assert found.dtype == torch.float32
            assert bool(expected.any())
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# --- the same features ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pooled", "unpooled"])
@pytest.mark.parametrize("id", BACKBONES)
def test_openvino_computes_the_features_of_every_provider(tmp_path: Path, id: str, kind: Kind) -> None:
    run = extractor(tmp_path, id=id, kind=kind)
    assert_equal_features(run, id, kind)
    assert (run.name, notes(run)) == ("openvino", [])


@pytest.mark.parametrize("kind", ["pooled", "unpooled"])
def test_onnx_runtime_computes_the_features(kind: Kind) -> None:
    backbone = load(RESNET)
    with torch.no_grad():
        made = ONNX.convert(FrozenFeatures(backbone, kind), images(backbone, 2).contiguous())
    assert_equal_features(ONNX.start(blob(made), 1), RESNET, kind)


def blob(made: bytes):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.frombuffer(made, np.uint8)


@pytest.mark.parametrize("kind", ["pooled", "unpooled"])
@pytest.mark.parametrize("id", [RESNET, "timm:test_efficientnet.r160_in1k", "efficientnet-lite:lite0"])
def test_folding_batch_norm_changes_no_feature(id: str, kind: Kind) -> None:
    backbone = load(id)
    with torch.no_grad():
        copy = folded(backbone, images(backbone, 1))
    assert copy is not None
    norms = [m for m in copy.module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == []
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.module.modules()), "a copy was folded"
    assert_equal_features(lambda x: features_of(copy, x, kind), id, kind)


def test_a_backbone_without_batch_norm_is_not_folded() -> None:
    backbone = load("timm:test_vit.r160_in1k")
    with torch.no_grad():
        assert folded(backbone, images(backbone, 1)) is None


@pytest.mark.parametrize(
    ("found", "is_same"),
    [
        ([1.0, 2.0], True),
        ([1.0, 2.001], True),
        ([1.0, 2.01], False),
        ([1.0, float("nan")], False),
        ([1.0], False),
    ],
)
def test_features_are_the_same_within_a_thousandth_of_the_largest(found: list[float], is_same: bool) -> None:
    assert same_features(torch.tensor(found), torch.tensor([1.0, 2.0])) is is_same


# --- the choice -------------------------------------------------------------------------------------


def test_few_images_do_not_pay_for_a_conversion(tmp_path: Path) -> None:
    run = extractor(tmp_path, count=20)
    run(images(load(RESNET)))
    assert (run.name, notes(run)) == ("pytorch, BatchNorm folded", [])
    assert not (tmp_path / "engines").exists()


def test_the_choice_does_not_depend_on_what_is_in_the_cache(tmp_path: Path) -> None:
    assert named(tmp_path, count=MANY) == "openvino"
    assert named(tmp_path, count=20) == named(tmp_path / "empty", count=20) != "openvino"


def named(folder: Path, *, count: int) -> str:
    run = extractor(folder, count=count)
    run(images(load(RESNET)))
    return run.name


def test_two_runs_from_empty_caches_give_the_same_bits(tmp_path: Path) -> None:
    first, second = (extractor(tmp_path / name)(images(load(RESNET))) for name in "ab")
    assert torch.equal(first, second)


def test_a_kept_conversion_gives_the_same_bits(tmp_path: Path) -> None:
    first = extractor(tmp_path)(images(load(RESNET)))
    (entry,) = entries(tmp_path)
    assert (entry.kind, entry.backbone, entry.images) == ("engines", RESNET, None)
    written = entry.path.stat().st_mtime_ns
    assert torch.equal(extractor(tmp_path)(images(load(RESNET))), first)
    assert entry.path.stat().st_mtime_ns == written
    assert clear(tmp_path).removed + clear(tmp_path).kept == 1


def test_more_images_and_fewer_threads_make_a_conversion_pay() -> None:
    backbone = load("efficientnet-lite:lite0")
    with torch.no_grad():
        work = measure_work(backbone, "pooled", images(backbone, 2))
        assert work == measure_work(backbone, "pooled", images(backbone, 2))
    assert 10e6 < work.elements < 20e6
    paying = [OPENVINO.pays(work, count, 2) for count in (100, 1000)]
    assert paying == [False, True]
    assert OPENVINO.pays(work, 300, 1) and not OPENVINO.pays(work, 300, 8)
    assert not ONNX.pays(work, 1000, 2), "its conversion takes longer"


# --- what can go wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut", "no sidecar"])
def test_a_damaged_conversion_is_made_again(tmp_path: Path, damage: str) -> None:
    extractor(tmp_path)(images(load(RESNET)))
    (path,) = (tmp_path / "engines").glob("*.npy")
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif damage == "cut":
        path.write_bytes(whole[:5000])
    else:
        path.with_suffix(".json").unlink()
    written = path.stat().st_mtime_ns
    run = extractor(tmp_path)
    assert_equal_features(run, RESNET, "pooled")
    assert (run.name, notes(run)) == ("openvino", [])
    assert damage == "no sidecar" or path.stat().st_mtime_ns > written


@pytest.mark.parametrize(
    ("blocked", "expected"),
    [
        (("openvino", "onnxruntime"), "pytorch, BatchNorm folded"),
        (("openvino", "onnxscript"), "pytorch, BatchNorm folded"),
        (("openvino",), "onnxruntime"),
    ],
)
def test_a_missing_package_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: tuple[str, ...], expected: str
) -> None:
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)
    run = extractor(tmp_path)
    assert_equal_features(run, RESNET, "pooled")
    assert (run.name, notes(run)) == (expected, [])


def test_openvino_is_imported_without_its_telemetry_and_only_when_it_runs() -> None:
    code = textwrap.dedent(
        """
        import sys
        from tlauto.training.engines import converted
        assert "openvino" not in sys.modules
        openvino = converted._openvino()
        assert callable(openvino.convert_model)
        assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
        from openvino.tools.ovc import telemetry
        assert type(telemetry).__module__ == "openvino.tools.ovc.telemetry_stub"
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


class Network(torch.nn.Module):
    """A backbone of its own class, whose features depend on a branch that exporters do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.source = load(RESNET)
        self.module, self.input = self.source.module, self.source.input

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        features = self.source.pooled(x)
        return features * 2 if len(x) > 2 else features

    unpooled = pooled


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_engine_that_computes_something_else_is_not_used(tmp_path: Path) -> None:
    run = extractor(tmp_path)
    run.backbone = Network()  # type: ignore[assignment]
    run._plain = run.backbone.pooled
    found = run(images(load(RESNET)))
    assert torch.equal(found, run.backbone.pooled(images(load(RESNET))))
    assert run.name == "pytorch"
    assert any("openvino computes other features than PyTorch" in note for note in notes(run))


def test_an_engine_that_fails_later_gives_way_to_pytorch(tmp_path: Path) -> None:
    run = extractor(tmp_path)
    run(images(load(RESNET)))
    assert run.name == "openvino"

    def fail(_images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")

    run._engine = fail
    assert_equal_features(run, RESNET, "pooled")
    assert run.name == "pytorch"
    assert notes(run) == ["openvino cannot run this backbone, PyTorch does it instead: out of luck"]


def test_wrong_images_are_an_error_of_pytorch(tmp_path: Path) -> None:
    run = extractor(tmp_path, count=20)
    run(images(load(RESNET)))
    with pytest.raises(RuntimeError, match="channels"):
        run(torch.zeros(2, 5, 160, 160))


# --- measured ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_engines_are_measured_side_by_side(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    bench = Path(__file__).parents[2] / "bench" / "forward.py"
    options = ["--quick", "--no-pretrained", "--data=patches", "--images=12", "--rounds=2", "--threads=1"]
    done = subprocess.run(
        [sys.executable, str(bench), *options, "--backbone", RESNET],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == {}
    measured = found["engines"]
    assert {"plain script: NCHW", "NCHW", "pytorch", "openvino", "onnxruntime"} < measured.keys()
    assert all(0 <= engine["difference"] < 1e-4 for engine in measured.values())
    rates = {name: engine["images_per_s"] for name, engine in measured.items()}
    best = max(rate for name, rate in rates.items() if name != "plain script: NCHW")
    assert found["engine_ratio"] == pytest.approx(rates[found["chosen"]] / best, abs=0.01)
    ratio = rates[found["chosen"]] / rates["plain script: NCHW"]
    assert found["nchw_ratio"] == pytest.approx(ratio, rel=0.01)
    assert not (tmp_path / "cache").exists(), "it works in a cache of its own"


# --- in the trials ----------------------------------------------------------------------------------


def test_cached_features_say_which_engine_made_them(
    spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    source = FeatureSource(spec, registry, dataset, CPU)
    found = source.features(["train"], "pooled")
    (sidecar,) = Path(spec.cache, "features").glob("*.json")
    assert json.loads(sidecar.read_text())["engine"] == "pytorch, BatchNorm folded"
    assert found.shape == (24, source.facts.widths.shape.pooled)
