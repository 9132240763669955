"""Keras Applications as ordinary PyTorch modules.

Keras on its PyTorch backend hides a network from PyTorch: one flat dictionary of parameters that
also holds BatchNorm's statistics, no submodules, names that depend on what was built before, and
`train()`/`eval()` without effect. `KerasNetwork` puts that right. This module imports torch: import
it inside functions.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tlauto.errors import ConfigError

if TYPE_CHECKING:
    from tlauto.builtin.keras_catalogue import Application

# Keras' names of variables as torch calls them, so that strategies which go by name (biases only)
# work for every provider.
TORCH_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "variable": "weight",  # ConvNeXt's layer scale has no name of its own
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "depthwise_kernel": "depthwise_weight",
    "pointwise_kernel": "pointwise_weight",
}

# These refuse channels_first; the others give equal outputs in it (2e-5) in half the time.
CHANNELS_LAST_ONLY = ("DenseNet", "ConvNeXt", "NASNet")


def import_keras() -> Any:
    """The `keras` module on its PyTorch backend.

    Raises: ConfigError when the environment, or whoever imported it first, chose another backend.
    """
    chosen = os.environ.setdefault("KERAS_BACKEND", "torch")
    if "keras" in sys.modules:
        chosen = sys.modules["keras"].backend.backend()
    if chosen != "torch":
        raise ConfigError(
            f"Keras is set to the backend '{chosen}', and tlauto trains Keras backbones with PyTorch; "
            f"unset KERAS_BACKEND, or set KERAS_BACKEND=torch, and start again"
        )
    import keras

    return keras


def is_resizable(application: Application) -> bool:
    """Whether the network takes images of other sizes than its own.

    EfficientNet B1 to B7 and NASNet pad by the size of each map, and otherwise when Keras does not
    know the size, so their exact networks have a fixed one.
    """
    return not application.function.startswith(("EfficientNetB", "NASNet")) or application.size % 32 == 0


def build_model(application: Application, *, include_top: bool = False, weights: str | None = None) -> Any:
    """A Keras model on the CPU, randomly initialised unless `weights` is `imagenet` (downloaded).

    Random weights follow `torch.manual_seed`; Python's own random state is left as it was.
    """
    keras = import_keras()
    first = not application.function.startswith(CHANNELS_LAST_ONLY)
    is_open = is_resizable(application) and not include_top and weights is None
    side = None if is_open else application.size
    # On the CPU, where torch modules are built; left alone, Keras takes the first GPU.
    with _layout("channels_first" if first else "channels_last"), _seeded_by_torch(), keras.device("cpu"):
        return getattr(keras.applications, application.function)(
            weights=weights,
            include_top=include_top,
            input_shape=(3, side, side) if first else (side, side, 3),
            **application.arguments,
        )


def finalize(model: Any) -> None:
    """Recompute what a model's normalisation layers derive from their statistics, after these changed."""
    with import_keras().device("cpu"):
        for layer in leaf_layers(model):
            if hasattr(layer, "finalize_state"):
                layer.finalize_state()


def leaf_layers(model: Any) -> list[Any]:
    """The layers of a Keras model in order, those of nested models included."""
    nested = ([layer] if not hasattr(layer, "layers") else leaf_layers(layer) for layer in model.layers)
    return [layer for layers in nested for layer in layers]


class KerasNetwork(nn.Module):
    """A Keras model without classifier whose stages, layers and weights torch can see.

    `forward` gives pooled features (N, D) and `maps` the last feature maps (N, C, H, W) of
    normalised images (N, 3, H, W). Submodules are `stage<i>.<layer>`, stem first; a stage is all
    layers that work at one power of two of downsampling. Each layer's learnable weights are its
    parameters `weight` and `bias`, its statistics (BatchNorm's, input normalisation's) are buffers:
    in the state dict, in no stage. They are Keras' own tensors, so optimizers, `to()` and
    `load_state_dict` act on both. A BatchNorm or Dropout obeys its own submodule's `training`.
    """

    def __init__(self, application: Application, model: Any) -> None:
        super().__init__()
        keras = import_keras()
        self._application = application
        self._is_channels_last = application.function.startswith(CHANNELS_LAST_ONLY)
        # ConvNeXt without classifier ends in a normalisation that belongs behind the pooling.
        last = model.layers[-1]
        norms = (last,) if isinstance(last, keras.layers.LayerNormalization) else ()
        body = keras.Model(model.inputs, last.input) if norms else model
        # A tuple hides Keras' objects from nn.Module, which would register every tensor twice.
        self._keras = (model, body, norms)
        layers = [layer for layer in leaf_layers(model) if layer.weights or _drops(layer)]
        shells = {id(layer): _Layer(layer) for layer in layers}
        names = _stable_names(layers)
        for index, stage in enumerate(_group(self._levels(layers), shells)):
            self.add_module(
                f"stage{index}", nn.ModuleDict({names[key]: shells[key] for key in map(id, stage)})
            )
        for layer in layers:
            layer.register_forward_pre_hook(_obey(shells[id(layer)]), with_kwargs=True)
        self.register_load_state_dict_post_hook(_finalize_loaded)  # type: ignore[no-untyped-call]
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, D)."""
        with import_keras().device(str(images.device)):
            pooled = self._features(images).mean((1, 2) if self._is_channels_last else (2, 3))
            return self._normalised(pooled)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Feature maps (N, C, H, W) before global pooling."""
        with import_keras().device(str(images.device)):
            features = self._normalised(self._features(images))
            return features.permute(0, 3, 1, 2) if self._is_channels_last else features

    def stage_names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters by stage, stem first, each exactly once."""
        return tuple(
            tuple(f"{stage}.{name}" for name, _ in module.named_parameters())
            for stage, module in self.named_children()
        )

    def parts(self) -> list[tuple[nn.Module, list[nn.Parameter]]]:
        """Keras' layers, which are what is called, with the parameters of each."""
        ours = {id(parameter): parameter for parameter in self.parameters()}
        return [
            (layer, [ours[id(v.value)] for v in layer.weights if id(v.value) in ours])
            for layer in leaf_layers(self._keras[0])
        ]

    def extra_repr(self) -> str:
        """The application's name: networks of equal tensors may differ in it."""
        return self._application.name

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        _, body, _ = self._keras
        inputs = images.permute(0, 2, 3, 1) if self._is_channels_last else images
        features: torch.Tensor = body(inputs, training=False)
        return features

    def _normalised(self, features: torch.Tensor) -> torch.Tensor:
        _, _, norms = self._keras
        for norm in norms:
            features = norm(features)
        return features

    def _levels(self, layers: Sequence[Any]) -> dict[int, list[Any]]:
        """Layers in the order they run, by how often their input was halved; measured on one image."""
        size, axis = self._application.size, 1 if self._is_channels_last else 2
        levels: dict[int, list[Any]] = {}
        level = 0

        def record(layer: Any, _inputs: object, output: torch.Tensor) -> None:
            nonlocal level
            # Squeeze-and-excitation works on 1 x 1 maps within its block.
            if output.ndim == 4 and output.shape[axis] > 1:
                level = round(math.log2(size / output.shape[axis]))
            levels.setdefault(level, []).append(layer)

        hooks = [layer.register_forward_hook(record) for layer in layers]
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, size, size))
        finally:
            for hook in hooks:
                hook.remove()
        return dict(sorted(levels.items()))

    def __deepcopy__(self, memo: dict[int, Any]) -> KerasNetwork:
        # Keras would copy by way of a file format; building again and copying tensors is exact.
        with torch.random.fork_rng(devices=[]):
            copy = KerasNetwork(self._application, build_model(self._application))
        memo[id(self)] = copy
        for ours, theirs in zip(self._keras[0].variables, copy._keras[0].variables, strict=True):
            theirs.value.data = ours.value.data.clone()
        for ours, theirs in zip(self.parameters(), copy.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
            memo[id(ours)] = theirs
        for ours, theirs in zip(self.modules(), copy.modules(), strict=True):
            theirs.training = ours.training
        finalize(copy._keras[0])
        return copy


class _Layer(nn.Module):
    """The weights of one Keras layer: learnable ones as parameters, statistics as buffers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._variables = {_torch_name(variable.name): variable for variable in layer.weights}
        for name, variable in self._variables.items():
            if variable.trainable:
                self.register_parameter(name, variable.value)
            else:
                self.register_buffer(name, variable.value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Layer:
        # torch puts new tensors in the place of buffers, on some devices of parameters too; Keras
        # would go on computing with the old ones.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, variable in self._variables.items():
            variable._value = getattr(self, name)
        return self


def _torch_name(keras_name: str) -> str:
    """A variable's name in torch; Keras counts nameless ones over the whole process (`variable_198`)."""
    name = re.sub(r"_\d+$", "", keras_name)
    return TORCH_NAMES.get(name, name)


def _obey(shell: _Layer) -> Callable[..., Any]:
    """A hook that runs a Keras layer in training mode exactly while its submodule is in it."""

    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "training": shell.training} if "training" in kwargs else kwargs

    return hook


def _finalize_loaded(module: nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, KerasNetwork):
        finalize(module._keras[0])


def _drops(layer: Any) -> bool:
    return isinstance(layer, import_keras().layers.Dropout)


def _group(levels: dict[int, list[Any]], shells: dict[int, _Layer]) -> list[list[Any]]:
    """Layers by stage; a level in which nothing can learn (input normalisation) joins the next."""
    stages: list[list[Any]] = []
    waiting: list[Any] = []
    for layers in levels.values():
        waiting += layers
        if any(True for layer in layers for _ in shells[id(layer)].parameters()):
            stages.append(waiting)
            waiting = []
    return stages


def _stable_names(layers: Sequence[Any]) -> dict[int, str]:
    """A name for each layer (by id), the same in every build.

    Keras counts the layers that an application did not name over the whole process (`conv2d_37`);
    here they are counted within the network.
    """
    counts: dict[str, int] = {}
    names: dict[int, str] = {}
    for layer in layers:
        kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", type(layer).__name__).lower()
        name = layer.name.replace(".", "_")
        if re.fullmatch(rf"{kind}(_\d+)?", name):
            counts[kind] = counts.get(kind, -1) + 1
            name = f"{kind}_{counts[kind]}" if counts[kind] else kind
        names[id(layer)] = name
    return names


@contextlib.contextmanager
def _layout(data_format: str) -> Iterator[None]:
    """Keras' global image layout for a while."""
    config = import_keras().config
    before = config.image_data_format()
    config.set_image_data_format(data_format)
    try:
        yield
    finally:
        config.set_image_data_format(before)


@contextlib.contextmanager
def _seeded_by_torch() -> Iterator[None]:
    """Python's random numbers, from which Keras draws its seeds, follow torch's for a while."""
    before = random.getstate()
    random.seed(int(torch.randint(2**62, (1,))))
    try:
        yield
    finally:
        random.setstate(before)
