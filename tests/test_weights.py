"""Where weights come from, in which order, and what is said when they are not to be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

from tlauto.backbone import first_mismatches, hash_weights, load_strictly, read_tensors, tensor_shapes
from tlauto.builtin.timm_provider import TimmProvider
from tlauto.builtin.torchvision_provider import TorchvisionProvider
from tlauto.builtin.weights import check_network, folder_files, is_offline, read_sidecar, sha256_file
from tlauto.contracts import WeightsOptions
from tlauto.errors import UnknownNameError, WeightsError

TIMM = TimmProvider()
TORCHVISION = TorchvisionProvider()
TINY = "timm:test_resnet.r160_in1k"
SHUFFLE = "shufflenet_v2_x0_5"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Libraries' caches in a folder of this test, and nothing but this host on the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # discard: nobody listens there
    return tmp_path / "torch" / "hub" / "checkpoints"


def tiny_state(seed: int = 0, classes: int = 1000) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=classes)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def first_weight(backbone: Any) -> torch.Tensor:
    return next(iter(backbone.module.state_dict().values()))


# --- the folder -------------------------------------------------------------------------------------


def test_a_folder_gives_its_files_by_name_without_suffix(tmp_path: Path) -> None:
    (tmp_path / "timm" / "downloaded").mkdir(parents=True)
    for name in ("resnet18.a1_in1k.safetensors", "a.pth", ".hidden.pth", "notes.txt", "a.json"):
        (tmp_path / "timm" / name).write_bytes(b"")
    (tmp_path / "timm" / "downloaded" / "model.safetensors").write_bytes(b"")
    assert sorted(folder_files(str(tmp_path), "timm")) == ["a", "downloaded", "resnet18.a1_in1k"]
    assert folder_files(str(tmp_path), "keras") == {}
    assert folder_files(None, "timm") == {}


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere' does not exist; give --weights-dir"):
        TIMM.find("*", WeightsOptions(folder=str(tmp_path / "nowhere")))


def test_a_file_in_the_folder_is_a_backbone_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    save_file(tiny_state(1), tmp_path / "timm" / "test_resnet.my_flowers.safetensors")
    save_file(tiny_state(2), tmp_path / "timm" / "test_resnet.safetensors")
    options = WeightsOptions(folder=str(tmp_path), offline=True)
    found = {info.id: info for info in TIMM.find("test_resnet*", options)}
    assert list(found) == ["timm:test_resnet", "timm:test_resnet.my_flowers", TINY]
    assert found["timm:test_resnet.my_flowers"].pretraining == "my_flowers"
    assert found["timm:test_resnet.my_flowers"].licence == "unknown"
    assert found[TINY].licence == "Apache-2.0"
    for seed, id in ((1, "timm:test_resnet.my_flowers"), (2, "timm:test_resnet")):
        assert torch.equal(first_weight(TIMM.load(id, options)), next(iter(tiny_state(seed).values())))
    # A name without a tag means timm's default weights, but a file of that name says whose it is not.
    assert TIMM.weights_status(TINY, options).state == "missing"


def test_the_librarys_own_file_names_are_known(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "timm").mkdir()
    torch.manual_seed(0)
    state = models.get_model(SHUFFLE).state_dict()
    torch.save(state, tmp_path / "torchvision" / "shufflenetv2_x0.5-f707e7126e.pth")
    (tmp_path / "timm" / "mobilenetv2_100_ra-b33bc2c4.pth").write_bytes(b"")
    options = WeightsOptions(folder=str(tmp_path), offline=True)
    assert TORCHVISION.weights_status(f"torchvision:{SHUFFLE}.IMAGENET1K_V1", options).state == "at_hand"
    assert TORCHVISION.weights_status(f"torchvision:{SHUFFLE}", options).state == "at_hand"
    assert TIMM.weights_status("timm:mobilenetv2_100.ra_in1k", options).state == "at_hand"
    TORCHVISION.load(f"torchvision:{SHUFFLE}", options)


def test_a_bare_file_has_the_oldest_preprocessing_and_a_published_one_its_own(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    for name in ("mobilenet_v2.pth", "mobilenet_v2.IMAGENET1K_V2.pth"):
        torch.save(models.get_model("mobilenet_v2").state_dict(), tmp_path / "torchvision" / name)
    options = WeightsOptions(folder=str(tmp_path), offline=True)
    assert TORCHVISION.load("torchvision:mobilenet_v2", options).input.resize == 256
    assert TORCHVISION.load("torchvision:mobilenet_v2.IMAGENET1K_V2", options).input.resize == 232


def test_a_sidecar_says_how_to_build_and_to_prepare(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    save_file(tiny_state(), tmp_path / "timm" / "test_resnet.mine.safetensors")
    facts = {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bicubic", "crop_pct": 0.5,
             "input_size": 96, "licence": "CC0-1.0", "pretraining": "flowers",
             "kwargs": {"drop_path_rate": 0.1}}  # fmt: skip
    (tmp_path / "timm" / "test_resnet.mine.json").write_text(json.dumps(facts))
    options = WeightsOptions(folder=str(tmp_path), offline=True)
    wanted = TIMM.load("timm:test_resnet.mine", options).input
    assert (wanted.size, wanted.resize, wanted.interpolation) == (96, 192, "bicubic")
    assert (wanted.mean, wanted.std) == ((0, 0, 0), (1, 1, 1))
    (info,) = TIMM.find("test_resnet.mine", options)
    assert (info.licence, info.pretraining, info.input_size) == ("CC0-1.0", "flowers", 96)


@pytest.mark.parametrize("text", ["{", '{"means": [0, 0, 0]}', "[]", '{"mean": "dark"}'])
def test_a_sidecar_that_cannot_be_understood_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(WeightsError, match=r"x.json' does not describe weights"):
        read_sidecar(tmp_path / "x.safetensors")


def test_arguments_the_network_does_not_take_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    save_file(tiny_state(), tmp_path / "timm" / "test_resnet.x_pad_same.safetensors")
    options = WeightsOptions(folder=str(tmp_path), offline=True)
    with pytest.raises(WeightsError, match="cannot be built with pad_type='same'"):
        TIMM.load("timm:test_resnet.x_pad_same", options)


# --- given files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["timm:test_resnet", TINY])
@pytest.mark.parametrize("asked", ["timm:test_resnet", TINY])
def test_a_given_file_wins_whichever_way_the_default_weights_are_named(
    tmp_path: Path, given: str, asked: str
) -> None:
    (tmp_path / "timm").mkdir()
    save_file(tiny_state(1), tmp_path / "timm" / "test_resnet.r160_in1k.safetensors")
    save_file(tiny_state(2), tmp_path / "given.safetensors")
    options = WeightsOptions(files={given: str(tmp_path / "given.safetensors")}, folder=str(tmp_path))
    assert torch.equal(first_weight(TIMM.load(asked, options)), next(iter(tiny_state(2).values())))


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module.", "safetensors"])
def test_the_usual_forms_of_checkpoints_load(tmp_path: Path, wrap: str) -> None:
    state = tiny_state(3)
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pth")
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "module.":
        torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state if wrap == "plain" else {wrap: state}, path)
    assert tensor_shapes(path) == {name: tuple(t.shape) for name, t in state.items()}
    backbone = TIMM.load(TINY, WeightsOptions(files={TINY: str(path)}, offline=True))
    assert torch.equal(first_weight(backbone), next(iter(state.values())))


@pytest.mark.parametrize("classes", [0, 7, 1000, 1001])
def test_weights_load_with_any_classifier_and_without(tmp_path: Path, classes: int) -> None:
    save_file(tiny_state(4, classes), tmp_path / "w.safetensors")
    backbone = TIMM.load(TINY, WeightsOptions(files={TINY: str(tmp_path / "w.safetensors")}))
    assert backbone.feature_shape.pooled == 96
    assert torch.equal(first_weight(backbone), next(iter(tiny_state(4, classes).values())))


def test_weights_of_another_architecture_name_file_backbone_and_tensors(tmp_path: Path) -> None:
    save_file(tiny_state(), tmp_path / "w.safetensors")
    options = WeightsOptions(files={"timm:resnet18": str(tmp_path / "w.safetensors")}, offline=True)
    with pytest.raises(WeightsError, match=r"w.safetensors' does not hold weights of timm:resnet18: .*lacks"):
        TIMM.load("timm:resnet18", options)
    wide = {**tiny_state(), "layer1.0.conv1.weight": torch.zeros(3, 3)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match=r"'layer1.0.conv1.weight' is 3x3 instead of"):
        TIMM.load(TINY, WeightsOptions(files={TINY: str(tmp_path / "wide.safetensors")}))


def test_one_tensor_too_few_is_enough_to_refuse_a_file(tmp_path: Path) -> None:
    state = tiny_state()
    lost = next(name for name in state if name.endswith("layer3.0.conv1.weight"))
    save_file({n: t for n, t in state.items() if n != lost}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=f"it lacks '{lost}'"):
        TIMM.load(TINY, WeightsOptions(files={TINY: str(tmp_path / "w.safetensors")}))


def test_a_pickled_object_is_refused_and_never_loaded(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", pretrained=False), tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match="pickled objects, which are never loaded"):
        read_tensors(tmp_path / "whole.pth")


@pytest.mark.parametrize("content", [b"", b"text, not tensors", b"<html>404</html>", os.urandom(4000)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_a_sentence(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    for read in (read_tensors, tensor_shapes):
        with pytest.raises(WeightsError, match=f"damaged{suffix}"):
            read(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_a_sentence(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tiny_state(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(WeightsError, match=f"w{suffix}' cannot be read"):
        TIMM.load(TINY, WeightsOptions(files={TINY: str(path)}))


def test_tensors_are_copied_only_when_all_fit() -> None:
    module = torch.nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(WeightsError, match="'bias' is 4 instead of 3"):
        load_strictly(module, {"weight": torch.ones(3, 2), "bias": torch.ones(4)}, id="a:b", path=Path("f"))
    assert torch.equal(module.weight, before)
    load_strictly(module, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, id="a:b", path=Path("f"))
    assert module.weight.eq(1).all()


def test_mismatches_name_the_first_and_count_the_rest() -> None:
    assert first_mismatches({"a": (1,)}, {"a": (1,)}) is None
    text = first_mismatches({"a": (1, 2), "b": (), "c": (3,)}, {"a": (2, 2), "x": (1,), "y": (1,)})
    assert text == "'a' is 2x2 instead of 1x2; it lacks 'b' and 1 more; it has an unknown 'x' and 1 more"


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


# --- caches and the network -------------------------------------------------------------------------


def test_torch_hubs_cache_is_used_offline(empty_caches: Path) -> None:
    empty_caches.mkdir(parents=True)
    torch.manual_seed(0)
    state = models.get_model(SHUFFLE).state_dict()
    torch.save(state, empty_caches / "shufflenetv2_x0.5-f707e7126e.pth")
    options = WeightsOptions(offline=True)
    assert TORCHVISION.weights_status(f"torchvision:{SHUFFLE}", options).state == "at_hand"
    backbone = TORCHVISION.load(f"torchvision:{SHUFFLE}", options)
    assert torch.equal(first_weight(backbone), next(iter(state.values())))


def test_the_hugging_face_hubs_cache_is_used_offline(tmp_path: Path) -> None:
    # In a process of its own: huggingface_hub reads HF_HOME when it is imported.
    repository = tmp_path / "hf" / "hub" / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(tiny_state(5), repository / "snapshots" / "abc" / "model.safetensors")
    code = (
        "from tlauto import WeightsOptions; from tlauto.builtin.timm_provider import TimmProvider\n"
        f"options, provider, id = WeightsOptions(offline=True), TimmProvider(), {TINY!r}\n"
        "print(provider.weights_status(id, options).detail)\n"
        "print(next(provider.load(id, options).module.parameters()).sum().item())\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    detail, total = result.stdout.splitlines()
    assert detail == f"cache: {repository}/snapshots/abc/model.safetensors"
    assert float(total) == pytest.approx(next(iter(tiny_state(5).values())).sum().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("provider", "id", "host"),
    [(TIMM, TINY, "huggingface"), (TORCHVISION, f"torchvision:{SHUFFLE}", "download.pytorch.org")],
    ids=["timm", "torchvision"],
)
def test_weights_that_are_nowhere_are_a_sentence_in_seconds(provider: Any, id: str, host: str) -> None:
    status = provider.weights_status(id, WeightsOptions())
    assert status.state == "downloadable"
    assert host in status.detail.lower().replace(" ", "") or "hugging face" in status.detail.lower()
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"must be downloaded and .* cannot be reached"):
        provider.load(id, WeightsOptions())
    assert time.monotonic() - started < 5
    missing = provider.weights_status(id, WeightsOptions(offline=True))
    assert missing.state == "missing"
    with pytest.raises(WeightsError, match="--offline forbids the download; give a --weights-dir"):
        provider.load(id, WeightsOptions(offline=True))


def test_random_weights_only_when_asked_for_and_then_by_the_seed() -> None:
    options = WeightsOptions(pretrained=False, offline=True)
    assert TIMM.weights_status(TINY, options).state == "at_hand"
    hashes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hashes.append(hash_weights(TIMM.load(TINY, options)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hubs_own_offline_switch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_offline(WeightsOptions())
    assert is_offline(WeightsOptions(offline=True))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_offline(WeightsOptions())


def test_a_reachable_host_passes_and_the_proxy_is_what_must_be_reachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        check_network("https://weights.invalid/x.pth", id="a:b")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        check_network(f"http://127.0.0.1:{port}/x.pth", id="a:b")
    with pytest.raises(WeightsError, match="cannot be reached"):
        check_network("https://weights.invalid/x.pth", id="a:b")


@pytest.mark.parametrize(
    ("provider", "id", "text"),
    [
        (TIMM, "timm:resnt18", "no backbone 'resnt18' in provider 'timm'; did you mean 'resnet18'"),
        (TIMM, "timm:resnet18.a9_in1k", "no weights 'resnet18.a9_in1k' .* did you mean 'resnet18.a"),
        (TORCHVISION, "torchvision:resnt18", "did you mean 'resnet18'"),
        (TORCHVISION, "torchvision:resnet18.IMAGENET1K_V3", "did you mean 'resnet18.IMAGENET1K_V1'"),
    ],
)
def test_a_misspelt_name_offers_the_closest(provider: Any, id: str, text: str) -> None:
    with pytest.raises(UnknownNameError, match=text):
        provider.load(id, WeightsOptions(offline=True))


# --- catalogues -------------------------------------------------------------------------------------


def test_the_whole_catalogues_are_found() -> None:
    options = WeightsOptions(offline=True)
    found = TIMM.find("*", options)
    square = [n for n in timm.list_models(pretrained=True) if "sapiens2" not in n]
    assert [info.name for info in found] == sorted(square)
    assert len(found) > 1500
    published = [
        f"{arch}.{entry.name}"
        for arch in models.list_models(module=models)
        for entry in models.get_model_weights(arch)
    ]
    assert [info.name for info in TORCHVISION.find("*", options)] == sorted(published)


def test_a_network_that_wants_oblong_images_is_said_to_be_unsupported() -> None:
    from tlauto.errors import ConfigError

    with pytest.raises(ConfigError, match="1024 x 768 pixels; only square ones"):
        TIMM.load("timm:vit_base_patch16_sapiens2.fb", WeightsOptions(pretrained=False))


@pytest.mark.parametrize("provider", [TIMM, TORCHVISION], ids=["timm", "torchvision"])
def test_shortlisted_facts_are_those_of_the_library(provider: Any) -> None:
    options = WeightsOptions(offline=True)
    for info in provider.shortlist():
        assert info.licence in {"Apache-2.0", "MIT", "BSD-3-Clause"}, "permissive licences only"
        if provider is TIMM:
            cfg = timm.models.get_pretrained_cfg(info.name)
            assert (cfg.input_size[1], cfg.tag) == (info.input_size, info.pretraining)
            assert cfg.license == info.licence.lower()
        else:
            entry = models.get_model_weights(info.name).DEFAULT
            assert (entry.name, entry.transforms().crop_size) == (info.pretraining, [info.input_size])
            assert info.accuracy == pytest.approx(
                entry.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100, abs=1e-4
            )
        assert provider.find(info.name, options) == (info,)


def test_shortlisted_sizes_are_those_of_the_networks() -> None:
    for info in TIMM.shortlist():
        with torch.device("meta"):
            model = timm.create_model(info.name, pretrained=False, num_classes=0)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(info.params_m, abs=0.01)
