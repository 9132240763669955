"""What every head promises, as tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from tlauto.contracts import FeatureShape, TaskHead
from tlauto.space import Scalar, defaults
from tlauto.testing.spaces import Tracked, check_name, check_space, heavy_imports, points

if TYPE_CHECKING:
    import torch
    from torch import nn

SHAPE = FeatureShape(pooled=24, unpooled=(12, 3, 2))
"""Pooled and unpooled widths differ, as in backbones that end with a layer after pooling."""
OUTPUTS = {"multiclass": (2, 5), "multilabel": (1, 4), "regression": (1,)}


class TaskHeadSuite:
    """Subclass it, set `head`, and pytest runs these tests on it.

    class TestMine(TaskHeadSuite):
        head = Mine()
    """

    head: TaskHead

    def test_it_has_the_members_of_a_head(self) -> None:
        assert isinstance(self.head, TaskHead), "it needs name, tasks, space, features() and build()"
        check_name(self.head.name)
        check_space(self.head.space)
        assert self.head.tasks, "it must name the tasks it does"
        assert set(self.head.tasks) <= set(OUTPUTS), f"known tasks: {', '.join(OUTPUTS)}"

    def test_importing_it_loads_no_heavy_library(self) -> None:
        module = type(self.head).__module__
        assert heavy_imports(module) == [], f"import these inside functions of {module}"

    def test_it_turns_features_into_one_row_of_logits_for_each_image(self) -> None:
        import torch

        for params, outputs in self._cases():
            module = self.head.build(SHAPE, outputs, params)
            for training in (True, False):
                logits = module.train(training)(self._features(4, params))
                assert logits.shape == (4, outputs), f"{params}: {tuple(logits.shape)}"
                assert torch.isfinite(logits).all(), f"{params}: not finite"

    def test_in_inference_an_image_alone_has_the_logits_it_has_among_others(self) -> None:
        import torch

        for params, outputs in self._cases():
            module = self.head.build(SHAPE, outputs, params).eval()
            features = self._features(3, params)
            together = module(features)
            alone = torch.cat([module(one[None]) for one in features])
            torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)

    def test_every_parameter_of_the_module_gets_a_gradient(self) -> None:
        for params, outputs in self._cases():
            module = self.head.build(SHAPE, outputs, params)
            logits = module(self._features(8, params))
            (logits * _signs(logits)).sum().backward()
            without = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
            assert not without, f"{params}: no gradient for {without}"

    def test_the_same_seed_builds_the_same_weights_under_the_same_names(self) -> None:
        import torch

        for params, outputs in self._cases():
            first, second = (self._build(params, outputs, seed=3).state_dict() for _ in range(2))
            assert list(first) == list(second), f"{params}: names differ between two builds"
            assert all(torch.equal(first[name], second[name]) for name in first), f"{params}: values differ"

    def test_its_weights_survive_a_safetensors_file(self, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        params, outputs = next(self._cases())
        saved = self._build(params, outputs, seed=1).eval()
        # Shared tensors are refused here: a head may not hold one tensor under two names.
        save_file(saved.state_dict(), tmp_path / "head.safetensors")
        loaded = self._build(params, outputs, seed=2).eval()
        loaded.load_state_dict(load_file(tmp_path / "head.safetensors"))
        features = self._features(4, params)
        assert torch.equal(saved(features), loaded(features))

    def test_it_reads_every_parameter_of_its_space(self) -> None:
        read: set[str] = set()
        for values in points(self.head.space):
            params = Tracked(values)
            self.head.features(params)
            self.head.build(SHAPE, 2, params)
            read |= params.read
        assert read == set(self.head.space), "a parameter that is never read wastes the search"

    def test_it_learns_separable_data_of_each_of_its_tasks(self) -> None:
        for task in self.head.tasks:
            before, after = _losses(self.head, task, self._features(64, defaults(self.head.space)))
            assert after < 0.5 * before, f"{task}: the loss went from {before:.3f} to {after:.3f}"

    def _cases(self) -> Iterator[tuple[Mapping[str, Scalar], int]]:
        counts = sorted({count for task in self.head.tasks for count in OUTPUTS[task]})
        for params in points(self.head.space):
            for count in counts:
                yield params, count

    def _build(self, params: Mapping[str, Scalar], outputs: int, *, seed: int) -> nn.Module:
        import torch

        torch.manual_seed(seed)
        return self.head.build(SHAPE, outputs, params)

    def _features(self, n: int, params: Mapping[str, Scalar]) -> torch.Tensor:
        import torch

        kind = self.head.features(params)
        assert kind in ("pooled", "unpooled"), f"features() returned {kind!r}"
        shape = (SHAPE.pooled,) if kind == "pooled" else SHAPE.unpooled
        return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def _signs(logits: torch.Tensor) -> torch.Tensor:
    """+1 and -1 in turn, so that a gradient is not zero by symmetry."""
    import torch

    return 1 - 2 * (torch.arange(logits.numel()).reshape(logits.shape) % 2)


def _losses(head: TaskHead, task_name: str, features: torch.Tensor) -> tuple[float, float]:
    """The loss before and after 200 steps of Adam on targets that are linear in the features."""
    import torch

    from tlauto.builtin.tasks import task as find_task

    torch.manual_seed(0)
    task, outputs = find_task(task_name), max(OUTPUTS[task_name])
    truth = features.flatten(1) @ torch.randn(prod(features.shape[1:]), outputs)  # (N, K)
    choices = {"multiclass": truth.argmax(1), "multilabel": (truth > 0).float(), "regression": truth[:, 0]}
    targets = choices[task_name]
    loss = task.loss(targets.numpy(), outputs, defaults(task.space))
    params = defaults(head.space)
    module = head.build(SHAPE, outputs, params)
    scale = float(targets.std()) if task_name == "regression" else 1.0
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    first = last = 0.0
    for step in range(200):
        value = loss(module(features) * scale, targets)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        first, last = (value.item() if step == 0 else first), value.item()
    return first, last
