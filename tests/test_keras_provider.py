"""The Keras provider: its catalogue, and where weights come from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tlauto.builtin.keras_catalogue import CATALOGUE, REFUSED
from tlauto.builtin.keras_provider import KerasProvider
from tlauto.contracts import WeightsOptions
from tlauto.errors import UnknownNameError, WeightsError

os.environ.setdefault("KERAS_BACKEND", "torch")
# Keras' own `save_weights`, which only these tests call.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")
PROVIDER = KerasProvider()
RANDOM = WeightsOptions(pretrained=False)
TINY = "keras:MobileNet-0.25-128"
# Nothing listens on port 9, so a download through it fails at once, on any machine.
NO_NETWORK = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Keras, and no way to the network."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, NO_NETWORK)
    for variable in ("no_proxy", "NO_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "keras"


def keras_model(name: str, **arguments: Any) -> Any:
    """An application built by Keras itself."""
    import keras

    application = CATALOGUE[name]
    return getattr(keras.applications, application.function)(
        input_shape=(application.size, application.size, 3), **application.arguments, **arguments
    )


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny application without classifier, as Keras saves them."""
    file = tmp_path_factory.mktemp("weights") / "tiny.weights.h5"
    keras_model("MobileNet-0.25-128", weights=None, include_top=False).save_weights(file)
    return file


# --- the catalogue ----------------------------------------------------------------------------------


def test_the_catalogue_holds_every_application_keras_offers() -> None:
    import keras

    offered = {name for name in dir(keras.applications) if callable(getattr(keras.applications, name))}
    assert offered == {application.function for application in CATALOGUE.values()} | set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_keras_still_refuses_what_the_catalogue_leaves_out(name: str) -> None:
    import keras

    with pytest.raises(ValueError, match="torch backend"):
        getattr(keras.applications, name)(weights=None, include_top=False)
    with pytest.raises(UnknownNameError, match="Keras cannot build it on PyTorch"):
        PROVIDER.load(f"keras:{name}", RANDOM)


@pytest.mark.parametrize(
    "name",
    ["MobileNet-0.25-128", "MobileNet-0.75-192", "MobileNetV2-0.35-96", "MobileNetV2",
     "MobileNetV3Small-minimalistic", "MobileNetV3Large-0.75", "ResNet50V2", "EfficientNetB0",
     "EfficientNetV2B0", "ConvNeXtTiny"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*file socket:ResourceWarning")
def test_the_catalogue_names_the_files_keras_downloads(name: str) -> None:
    for include_top, file in zip((False, True), CATALOGUE[name].files, strict=True):
        with pytest.raises(Exception, match="URL fetch failure") as failure:
            keras_model(name, weights="imagenet", include_top=include_top)
        assert f"/{file}: " in str(failure.value)


@pytest.mark.parametrize("name", ["MobileNet-0.50-160", "MobileNetV3Small-0.75", "EfficientNetV2B0"])
def test_the_catalogue_counts_the_parameters_right(name: str) -> None:
    module = PROVIDER.load(f"keras:{name}", RANDOM).module
    counted = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    assert CATALOGUE[name].info.params_m == pytest.approx(counted, rel=0.005)


def test_a_glob_finds_the_variants_sorted_by_name() -> None:
    found = [info.name for info in PROVIDER.find("MobileNet-0.50-*", WeightsOptions())]
    assert found == [f"MobileNet-0.50-{size}" for size in (128, 160, 192, 224)]
    assert [info.name for info in PROVIDER.find("MobileNet", WeightsOptions())] == ["MobileNet"]
    assert PROVIDER.find("NoSuchNet*", WeightsOptions()) == ()
    assert len(PROVIDER.find("*", WeightsOptions())) == len(CATALOGUE) == 79


def test_the_shortlist_has_true_ids_permissive_licences_and_one_default() -> None:
    shortlist = PROVIDER.shortlist()
    assert {info.name for info in shortlist} <= CATALOGUE.keys()
    assert {info.licence for info in shortlist} <= {"Apache-2.0", "MIT", "BSD-3-Clause"}
    assert [info.id for info in shortlist if info.is_default] == ["keras:MobileNetV2"]
    assert all(info.cost and info.gmacs and info.params_m and info.accuracy for info in shortlist)


def test_a_misspelt_name_gets_the_closest_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'MobileNetV2'"):
        PROVIDER.load("keras:MobilNetV2", RANDOM)


def test_shortlist_find_and_status_load_neither_keras_nor_torch() -> None:
    code = (
        "import sys; from tlauto.builtin.keras_provider import KerasProvider as P; "
        "from tlauto.contracts import WeightsOptions as W; p = P(); p.shortlist(); p.find('*', W()); "
        "p.weights_status('keras:VGG16', W()); print(sorted({'keras', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_another_keras_backend_is_refused_in_one_sentence() -> None:
    code = (
        "from tlauto.builtin.keras_provider import KerasProvider as P\n"
        "from tlauto.contracts import WeightsOptions as W; from tlauto.errors import ConfigError\n"
        "try: P().load('keras:MobileNetV2', W(pretrained=False))\nexcept ConfigError as e: print(e)"
    )
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert printed.startswith("Keras is set to the backend 'jax'") and "KERAS_BACKEND=torch" in printed


# --- weights ----------------------------------------------------------------------------------------


def test_weights_come_from_a_file_the_folder_or_keras_cache(
    weights_file: Path, tmp_path: Path, keras_home: Path
) -> None:
    name = CATALOGUE["MobileNet-0.25-128"].files[0]
    options = WeightsOptions(folder=str(tmp_path / "mine"), offline=True)
    (tmp_path / "mine" / "keras").mkdir(parents=True)
    assert PROVIDER.weights_status(TINY, options).state == "missing"
    (keras_home / "models").mkdir(parents=True)
    shutil.copy(weights_file, keras_home / "models" / name)
    assert PROVIDER.weights_status(TINY, options).path == str(keras_home / "models" / name)
    ours = tmp_path / "mine" / "keras" / "MobileNet-0.25-128.weights.h5"
    shutil.copy(weights_file, ours)
    assert PROVIDER.weights_status(TINY, options).path == str(ours)
    given = WeightsOptions(files={TINY: str(weights_file)}, folder=options.folder)
    assert PROVIDER.weights_status(TINY, given).path == str(weights_file)


def test_random_weights_are_used_only_when_asked_for() -> None:
    assert PROVIDER.weights_status(TINY, RANDOM).state == "at_hand"
    with pytest.raises(WeightsError, match="--offline forbids the download"):
        PROVIDER.load(TINY, WeightsOptions(offline=True))


def test_no_network_ends_in_one_sentence_within_seconds() -> None:
    assert PROVIDER.weights_status(TINY, WeightsOptions()).state == "downloadable"
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"cannot be reached .* --weights keras:MobileNet-0.25-128=PATH"):
        PROVIDER.load(TINY, WeightsOptions())
    assert time.monotonic() - start < 5


def test_weights_of_another_width_or_network_are_refused(weights_file: Path) -> None:
    for name in ("MobileNet-0.50-128", "MobileNetV3Small", "MobileNetV2-0.35-96"):
        id = f"keras:{name}"
        with pytest.raises(WeightsError, match=f"does not hold weights of {id}"):
            PROVIDER.load(id, WeightsOptions(files={id: str(weights_file)}))


def _truncated(file: Path, source: Path) -> None:
    file.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


def _text(file: Path, source: Path) -> None:
    file.write_text("<html>404</html>")


def _empty(file: Path, source: Path) -> None:
    file.touch()


@pytest.mark.parametrize("damage", [_truncated, _text, _empty])
@pytest.mark.parametrize("name", ["damaged.h5", "damaged.weights.h5", "damaged.keras"])
def test_a_damaged_file_is_named(
    damage: Callable[[Path, Path], None], name: str, weights_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    damage(file, weights_file)
    with pytest.raises(WeightsError, match=f"'{file}'"):
        PROVIDER.load(TINY, WeightsOptions(files={TINY: str(file)}))


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    with pytest.raises(WeightsError, match=r"Keras reads \.h5, \.weights\.h5 and \.keras"):
        PROVIDER.load(TINY, WeightsOptions(files={TINY: str(file)}))


def test_a_legacy_file_with_classifier_gives_the_backbone_its_weights(tmp_path: Path) -> None:
    whole = keras_model("MobileNet-0.25-128", weights=None, include_top=True)
    file = tmp_path / "mobilenet_2_5_128_tf.h5"
    whole.save(file)
    module = PROVIDER.load(TINY, WeightsOptions(files={TINY: str(file)})).module
    ours = dict(module.named_parameters())
    assert torch.equal(ours["stage0.conv1.weight"], whole.get_layer("conv1").kernel.value)
    assert torch.equal(ours["stage4.conv_pw_13_bn.bias"], whole.get_layer("conv_pw_13_bn").beta.value)
