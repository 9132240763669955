"""Features of all levels of a network from one forward pass: what each stage hands to the next, averaged.

The last stage of a network is made for the classes it was pretrained on; where images are far from those,
earlier stages tell more. Source: Evci et al. 2022, "Head2Toe" (arXiv:2201.03529).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import nn

from tlauto.backbone.split import Parts
from tlauto.levels import Level

Run = Callable[[torch.Tensor], torch.Tensor]
Hook = Callable[[nn.Module, tuple[torch.Tensor, ...]], None]

WIDEST = 8192
"""Most numbers an image that the levels may hold; of more, the last ones stay."""


class Handovers:
    """The modules of a network that are called with what a stage hands over.

    Args:
        parts: modules whose calls can be seen, each with all parameters in and below it.
        stage_of: the stage of each parameter, by `id`.
        run: a forward pass to the pooled features (N, D).
        images: (N, 3, H, W) for the pass that shows the order of the calls.

    Attributes:
        shape: of each level, the pooled features last.
    """

    def __init__(self, parts: Parts, stage_of: Mapping[int, int], *, run: Run, images: torch.Tensor) -> None:
        pooled, found = _first_calls(parts, stage_of, run, images)
        shape = [*found.values(), Level(pooled.shape[1], 1)]
        totals = accumulate(level.width for level in reversed(shape))
        kept = max(1, sum(total <= WIDEST for total in totals))
        self.shape = tuple(shape[-kept:])
        self._modules = list(found)[len(shape) - kept :]

    def levels(self, images: torch.Tensor, run: Run) -> torch.Tensor:
        """Levels (N, F) of normalised images (N, 3, H, W), each with its cells, the pooled features last."""
        taken: dict[int, torch.Tensor] = {}

        def taking(place: int) -> Hook:
            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if place not in taken:  # not when it is called once more
                    taken[place] = cells_of(args[0]).flatten(1)  # at once: the module may work in place

            return hook

        with _hooked((module, taking(place)) for place, module in enumerate(self._modules)):
            pooled = run(images)
        return torch.cat([*(taken[place] for place in range(len(self._modules))), pooled], dim=1)


def cells_of(activation: torch.Tensor) -> torch.Tensor:
    """Means (N, C, 4) over the quarters of maps (N, C, H, W) or (N, H, W, C) of square images.

    An odd middle row belongs to both halves. Tokens (N, L, C) and maps of one pixel have one cell.
    """
    if activation.ndim == 3:
        return activation.mean(dim=1)[:, :, None]
    if activation.shape[1] == activation.shape[2] != activation.shape[3]:
        activation = activation.permute(0, 3, 1, 2)
    height, width = activation.shape[2:]
    if min(height, width) < 2:
        return activation.mean(dim=(2, 3))[:, :, None]
    h, w = (height + 1) // 2, (width + 1) // 2
    top, bottom = activation[:, :, :h], activation[:, :, height - h :]
    quarters = [half[..., part] for half in (top, bottom) for part in (slice(0, w), slice(width - w, width))]
    return torch.stack([quarter.mean(dim=(2, 3)) for quarter in quarters], dim=2)


def narrowed(levels: torch.Tensor, shape: tuple[Level, ...], *, to: str) -> torch.Tensor:
    """The part (N, ...) of all cells of all levels (N, F) that a kind of features is.

    Args:
        to: `pooled`, the last level; `levels`, the mean of each; `grid`, all as they are.
    """
    if to == "grid":
        return levels
    if to == "pooled":
        return levels[:, -shape[-1].channels :]
    parts = torch.split(levels, [level.width for level in shape], dim=1)
    means = [
        part if level.cells == 1 else part.reshape(-1, level.channels, level.cells).mean(dim=2)
        for part, level in zip(parts, shape, strict=True)
    ]
    return torch.cat(means, dim=1)


def _first_calls(
    parts: Parts, stage_of: Mapping[int, int], run: Run, images: torch.Tensor
) -> tuple[torch.Tensor, dict[nn.Module, Level]]:
    """The pooled features, and for each stage but the first the first module called of it or later ones.

    With each module comes the form of what it is called with. Modules that are called with anything
    but maps or tokens are left out.
    """
    firsts: dict[int, nn.Module] = {}
    levels: dict[nn.Module, Level] = {}

    def noting(stage: int) -> Hook:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            fresh = [s for s in range(1, stage + 1) if s not in firsts]
            firsts.update(dict.fromkeys(fresh, module))
            if fresh and args and _is_activation(args[0], len(images)):
                levels[module] = Level(*cells_of(args[0]).shape[1:])

        return hook

    # What a copy has besides (the bias of a convolution with a BatchNorm folded in) is in no stage.
    stages = {m: [stage_of[id(p)] for p in own if id(p) in stage_of] for m, own in parts}
    lowest = {m: min(own, default=0) for m, own in stages.items()}
    with _hooked((module, noting(stage)) for module, stage in lowest.items() if stage > 0):
        pooled = run(images)
    return pooled, levels


def _is_activation(value: object, count: int) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim in (3, 4)
        and value.is_floating_point()
        and value.shape[0] == count
    )


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """With hooks that see what these modules are called with."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
