"""A ready-made `Backbone` for an ordinary PyTorch network, and the hash of one's weights."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tlauto.backbone.levels import Handovers, Run
from tlauto.backbone.split import Parts, cut
from tlauto.backbone.stages import Features, device_of
from tlauto.contracts import Backbone, FeatureShape, ImageInput
from tlauto.errors import ConfigError, PluginError, did_you_mean
from tlauto.levels import Level
from tlauto.splits import Split

# By network, not in the backbone: a copy has a module of its own, whose stages hand over elsewhere.
_handovers: WeakKeyDictionary[nn.Module, Handovers] = WeakKeyDictionary()


def mean_of_map(module: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """Global average (N, C) of feature maps (N, C, H, W); `module` is not looked at."""
    return maps.mean(dim=(2, 3))


class TorchBackbone:
    """A `Backbone` for an `nn.Module` that takes normalised images (N, 3, H, W).

    Args:
        module: the network without its classifier.
        input: what it expects.
        stages: names of its parameters, stem first, every parameter exactly once.
        pooled: features (N, D) of (module, images); None averages `unpooled` over the map.
        unpooled: features (N, C, H, W) of (module, images).
        parts: modules whose calls show the order in which the parameters are used, where these are
            not the submodules of `module`.

    `feature_shape` is measured with a forward pass at `input.size`, never read from the network's
    own claims. Last stages that `unpooled` does not run through (VGG's dense layers) join the one
    before them, so that "the last stage" holds something for either kind of features.

    Raises: PluginError when the stages do not hold every parameter exactly once or the features have
    another number of dimensions.
    """

    def __init__(
        self,
        module: nn.Module,
        input: ImageInput,
        stages: Iterable[Iterable[str]],
        *,
        unpooled: Features,
        pooled: Features | None = None,
        parts: Callable[[], Parts] | None = None,
    ) -> None:
        self.module = module
        self.input = input
        self.stages = _checked_stages(module, stages)
        self._pooled = pooled
        self._unpooled = unpooled
        self._parts = parts
        self.level_shape: tuple[Level, ...] = ()
        self.feature_shape, ran = self._measure()
        self.stages = _join_unused_tail(self.stages, ran)

    def resize(self, input: ImageInput) -> None:
        """Take images like these from now on; the shapes of the features are measured anew."""
        self.input = input
        self.feature_shape, _ = self._measure()

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, D) of normalised images (N, 3, H, W)."""
        if self._pooled is None:
            return mean_of_map(self.module, self._unpooled(self.module, images))
        return self._pooled(self.module, images)

    def unpooled(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, C, H, W) of normalised images (N, 3, H, W), before global pooling."""
        return self._unpooled(self.module, images)

    def levels(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, F) of all levels, in the form of `level_shape`, `pooled` last."""
        if self.module not in _handovers:
            with torch.no_grad():
                _handovers[self.module] = self._find_handovers(images[:1], self.pooled)
        return _handovers[self.module].levels(images, self.pooled)

    def _find_handovers(self, images: torch.Tensor, run: Run) -> Handovers:
        parameters = dict(self.module.named_parameters())
        numbered = ((i, name) for i, names in enumerate(self.stages) for name in names)
        stage_of = {id(parameters[name]): i for i, name in numbered if name in parameters}
        return Handovers(self._seen_parts(), stage_of, run=run, images=images)

    def _seen_parts(self) -> Parts:
        return self._parts() if self._parts else [(m, list(m.parameters())) for m in self.module.modules()]

    def split(self, stage: int) -> Split | None:
        """The network cut before `stages[stage]`, shown to be exact; None where it cannot be cut."""
        return cut(
            self.module,
            self.stages,
            stage,
            runs={"pooled": self.pooled, "unpooled": self.unpooled},
            size=self.input.size,
            parts=self._seen_parts(),
        )

    def set_trainable(self, names: Collection[str]) -> None:
        """Let exactly these parameters learn; raises ConfigError for a name it does not have."""
        parameters = dict(self.module.named_parameters())
        for name in names:
            if name not in parameters:
                raise ConfigError(f"the backbone has no parameter '{name}'{did_you_mean(name, parameters)}")
        wanted = set(names)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in wanted)

    def set_training(self, training: bool) -> None:
        """Training or inference mode; what is frozen stays in inference mode either way.

        A subtree in which nothing learns is frozen, so its dropout and stochastic depth are off. A
        BatchNorm is frozen unless all its parameters learn. A module without parameters follows
        its nearest ancestor that has some.
        """
        if training:
            _set_mode(self.module, inherited=True)
            return
        for module in self.module.modules():
            module.training = False

    def _measure(self) -> tuple[FeatureShape, set[str]]:
        """The shape of the features, and the names of the modules that `unpooled` called."""
        modes = {module: module.training for module in self.module.modules()}
        ran: set[str] = set()
        hooks = [m.register_forward_hook(_noting(ran, name)) for name, m in self.module.named_modules()]
        images = torch.zeros(1, 3, self.input.size, self.input.size, device=device_of(self.module))
        called: set[str] = set()
        shapes: dict[str, torch.Size] = {}

        def unpooled(images: torch.Tensor) -> torch.Tensor:
            maps = self.unpooled(images)
            shapes["unpooled"] = maps.shape
            called.update(ran)
            return maps

        def pooled(images: torch.Tensor) -> torch.Tensor:
            is_mean = self._pooled is None  # one pass for both then
            found = mean_of_map(self.module, unpooled(images)) if is_mean else self.pooled(images)
            shapes["pooled"] = found.shape
            return found

        try:
            self.module.eval()
            with torch.no_grad():
                if self._pooled is not None:
                    unpooled(images)
                handovers = self._find_handovers(images, pooled)
        finally:
            for handle in hooks:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
        narrow, wide = shapes["pooled"], shapes["unpooled"]
        if len(narrow) != 2 or len(wide) != 4:
            raise PluginError(
                f"the backbone {type(self.module).__name__} gives pooled features of shape {tuple(narrow)} "
                f"and unpooled ones of shape {tuple(wide)}; they must be (N, D) and (N, C, H, W)"
            )
        _handovers[self.module], self.level_shape = handovers, handovers.shape
        return FeatureShape(narrow[1], (wide[1], wide[2], wide[3])), called


def hash_weights(backbone: Backbone) -> str:
    """Hex sha256 of a backbone's parameters, buffers and structure: the same features, the same hash.

    The structure (the printed module tree) counts because two networks may hold equal tensors and
    still differ, as MobileNetV2 does between PyTorch's and TensorFlow's padding.
    """
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(backbone.module)).encode())
    tensors = [*backbone.module.named_parameters(), *backbone.module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_parameters(module: nn.Module) -> int:
    """How many numbers the parameters of a module hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def _checked_stages(module: nn.Module, stages: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    made = tuple(tuple(stage) for stage in stages)
    counts = Counter(name for stage in made for name in stage)
    expected = {name for name, _ in module.named_parameters()}
    wrong = sorted({name for name, count in counts.items() if count > 1} | (set(counts) ^ expected))
    if wrong:
        raise PluginError(
            f"the stages of {type(module).__name__} must name every parameter exactly once; "
            f"look at '{wrong[0]}' ({len(wrong)} in all)"
        )
    return made


def _noting(ran: set[str], name: str) -> Callable[[nn.Module, object, object], None]:
    def hook(_module: nn.Module, _inputs: object, _output: object) -> None:
        ran.add(name)

    return hook


def _join_unused_tail(stages: tuple[tuple[str, ...], ...], ran: set[str]) -> tuple[tuple[str, ...], ...]:
    """`stages` with trailing ones of which no module ran joined to the last one that did."""

    def is_used(parameter: str) -> bool:
        parts = parameter.split(".")[:-1]
        # A parent counts: attention reads its inner layers' weights without calling them. A parameter
        # of the network itself, such as a class token, is taken as used.
        return not parts or any(".".join(parts[: i + 1]) in ran for i in range(len(parts)))

    used = [i for i, stage in enumerate(stages) if any(is_used(name) for name in stage)]
    last = used[-1] if used else len(stages) - 1
    return (*stages[:last], tuple(name for stage in stages[last:] for name in stage))


def _set_mode(module: nn.Module, *, inherited: bool) -> None:
    mode = inherited
    parameters = list(module.parameters())
    if parameters:
        learning = [parameter.requires_grad for parameter in parameters]
        mode = all(learning) if _is_batch_norm(module) else any(learning)
    # Not `module.train(mode)`: that would overrule the children, which decide for themselves.
    module.training = mode
    for child in module.children():
        _set_mode(child, inherited=mode)


def _is_batch_norm(module: nn.Module) -> bool:
    return hasattr(module, "running_mean") and hasattr(module, "running_var")
