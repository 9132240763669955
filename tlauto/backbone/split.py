"""Cut a network before a stage without tracing it.

One forward pass shows the order of the calls. The boundary is the first call of a module all of whose
parameters belong to the later stages; what it is called with is the activation. The prefix is the
ordinary forward pass, left by an exception there. The suffix is the ordinary forward pass on blank
images, in which every module that had returned before the boundary answers with a placeholder and the
boundary is called with the activation. So a network's own Python code runs in both halves, whatever it
does, and a check shows whether anything else than the activation crosses the boundary: then there is
no split.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tlauto.backbone.stages import device_of
from tlauto.errors import PluginError

Kind = Literal["pooled", "unpooled"]
Run = Callable[[torch.Tensor], torch.Tensor]
Parts = Sequence[tuple[nn.Module, Sequence[nn.Parameter]]]
"""Modules whose calls can be seen, each with all parameters in and below it."""

TOLERANCE = 1e-4
"""Largest difference between a network and its halves, relative to the largest feature."""

PROBES = 2  # images of the check


@dataclass(frozen=True)
class _Route:
    """A forward pass to one kind of features.

    Attributes:
        boundary: the module that is called with the activation.
        answered: modules that returned before it was called, in order, with their answers' outlines.
    """

    run: Run
    boundary: nn.Module
    answered: Sequence[tuple[nn.Module, Any]]


class StageSplit:
    """A network cut before a stage; see `tlauto.splits.Split`."""

    def __init__(self, routes: Mapping[Kind, _Route], size: int) -> None:
        self._routes = routes
        self._size = size

    def prefix(self, images: torch.Tensor) -> torch.Tensor:
        """Activations at the boundary of normalised images (N, 3, H, W)."""

        def leave(_module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        route = self._routes["pooled"]
        handle = route.boundary.register_forward_pre_hook(leave)
        try:
            route.run(images)
        except _Reached as reached:
            return reached.activation
        finally:
            handle.remove()
        raise PluginError(f"the network did not call {type(route.boundary).__name__} as it did before")

    def suffix(self, activations: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Features (N, D), or (N, C, H, W) when unpooled, from activations at the boundary."""
        route = self._routes[kind]
        shape = (len(activations), 3, self._size, self._size)
        blank = torch.zeros((), device=activations.device).expand(shape)
        with _bypassed(route, activations):
            return route.run(blank)


def cut(
    module: nn.Module,
    stages: Sequence[Sequence[str]],
    stage: int,
    *,
    runs: Mapping[Kind, Run],
    size: int,
    parts: Parts | None = None,
) -> StageSplit | None:
    """The network cut before `stages[stage]`, checked on random images; None where it cannot be cut.

    Args:
        runs: the forward pass to each kind of features.
        size: side of its images, pixels.
        parts: defaults to the submodules of `module`.
    """
    if not 0 < stage < len(stages):
        return None
    names = {name for names in stages[stage:] for name in names}
    later = {id(parameter) for name, parameter in module.named_parameters() if name in names}
    seen = parts if parts is not None else [(m, list(m.parameters())) for m in module.modules()]
    # A generator of its own: a trial's random numbers must not depend on whether a split was tried.
    images = torch.randn(PROBES, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(device_of(module))
    with _for_checking(module, names):
        try:
            return _checked(runs, seen, later, images)
        except Exception:  # noqa: BLE001 what a network's code makes of placeholders may fail in any way
            return None


def agree(found: torch.Tensor, expected: torch.Tensor, *, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors differ by at most `tolerance` times the largest expected number."""
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().abs().max())


def _checked(
    runs: Mapping[Kind, Run], parts: Parts, later: set[int], images: torch.Tensor
) -> StageSplit | None:
    routes: dict[Kind, _Route] = {}
    expected: dict[Kind, torch.Tensor] = {}
    for kind, run in runs.items():
        recorder = _Recorder(parts, later)
        with torch.no_grad(), recorder.watching():
            expected[kind] = run(images)
        if recorder.boundary is None or recorder.activation is None:
            return None
        routes[kind] = _Route(run, recorder.boundary, recorder.outlines(len(images)))
    if len({id(route.boundary) for route in routes.values()}) != 1:
        return None
    split = StageSplit(routes, images.shape[-1])
    # With gradients, and all later stages learning: an activation that depends on one shows it.
    activations = split.prefix(images)
    if activations.requires_grad or len(activations) != len(images):
        return None
    with torch.no_grad():
        is_exact = all(agree(split.suffix(activations.clone(), kind), expected[kind]) for kind in runs)
    return split if is_exact else None


# --- the order of the calls -------------------------------------------------------------------------


@dataclass
class _Call:
    """A call of a module, by whom (index of the enclosing call), and what it returned."""

    module: nn.Module
    parent: int | None
    output: Any = None
    has_returned: bool = False


class _Recorder:
    """Notes the calls up to the first of a module whose parameters are all in `later` (by `id`)."""

    def __init__(self, parts: Parts, later: set[int]) -> None:
        self.parts = parts
        self.entries = {m for m, own in parts if own and all(id(p) in later for p in own)}
        self.calls: list[_Call] = []
        self.open: list[int] = []
        self.boundary: nn.Module | None = None
        self.activation: torch.Tensor | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note the calls for a while."""
        handles = [module.register_forward_pre_hook(self._enter) for module, _ in self.parts]
        handles += [module.register_forward_hook(self._leave) for module, _ in self.parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def outlines(self, count: int) -> list[tuple[nn.Module, Any]]:
        """Modules to bypass, in order, with the outlines of what they returned for `count` images."""
        around = {None, *self.open}
        # What was called within a module that has returned is bypassed together with it.
        returned = [call for call in self.calls if call.has_returned and call.parent in around]
        return [(call.module, _outline(call.output, self.activation, count)) for call in returned]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.boundary is not None:
            return
        if module in self.entries:
            self.boundary = module
            self.activation = args[0] if args and isinstance(args[0], torch.Tensor) else None
            return
        self.calls.append(_Call(module, self.open[-1] if self.open else None))
        self.open.append(len(self.calls) - 1)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.boundary is None:
            call = self.calls[self.open.pop()]
            call.output, call.has_returned = output, True


# --- placeholders -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hole:
    """A tensor of which only the form is known; `times` rows for each image."""

    times: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Activation:
    """The place of the activation itself: a residual branch may read it beside the boundary."""


class _Reached(BaseException):
    """Carries the activation out of a forward pass. No `Exception`: Keras would wrap it in another."""

    def __init__(self, activation: torch.Tensor) -> None:
        super().__init__("the boundary of a split was reached")
        self.activation = activation


def _outline(value: Any, activation: torch.Tensor | None, count: int) -> Any:
    """The form of a module's answer; raises ValueError for a tensor without an axis of images."""
    if value is activation:
        return _Activation
    if isinstance(value, torch.Tensor):
        if not value.ndim or value.shape[0] % count:
            raise ValueError(f"{tuple(value.shape)} is not an answer for {count} images")
        return _Hole(value.shape[0] // count, tuple(value.shape[1:]), value.dtype)
    if isinstance(value, (tuple, list)):
        return [_outline(item, activation, count) for item in value]
    return value


def _filled(outline: Any, activations: torch.Tensor) -> Any:
    """An answer of that form for as many images as there are activations."""
    if outline is _Activation:
        return activations
    if isinstance(outline, _Hole):
        # One zero seen as many: it takes no memory.
        zero = torch.zeros((), dtype=outline.dtype, device=activations.device)
        return zero.expand(outline.times * len(activations), *outline.shape)
    if isinstance(outline, list):
        return tuple(_filled(item, activations) for item in outline)
    return outline


@contextlib.contextmanager
def _bypassed(route: _Route, activations: torch.Tensor) -> Iterator[None]:
    """Let the modules of a route answer with placeholders until its boundary is called."""
    waiting: dict[nn.Module, deque[Any]] = {}
    for module, outline in route.answered:
        waiting.setdefault(module, deque()).append(outline)
    is_past = False

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal is_past
        if is_past:  # it is called once more
            return None
        is_past = True
        return (activations, *args[1:])

    def answering(forward: Callable[..., Any], answers: deque[Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            # One activation function may serve before and after the boundary.
            if is_past or not answers:
                return forward(*args, **kwargs)
            return _filled(answers.popleft(), activations)

        return answer

    before = {module: vars(module).get("forward") for module in waiting}
    handle = route.boundary.register_forward_pre_hook(enter)
    try:
        for module, answers in waiting.items():
            # Into the dictionary itself: Keras' layers watch what is assigned to them.
            vars(module)["forward"] = answering(module.forward, answers)
        yield
    finally:
        handle.remove()
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


@contextlib.contextmanager
def _for_checking(module: nn.Module, learning: set[str]) -> Iterator[None]:
    """Inference mode, and exactly these parameters learning, for a while."""
    modes = {m: m.training for m in module.modules()}
    flags = {p: p.requires_grad for p in module.parameters()}
    try:
        module.eval()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in learning)
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
