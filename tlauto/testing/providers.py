"""What every backbone provider promises, as tests on one of its backbones."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from tlauto.contracts import (
    Backbone,
    BackboneInfo,
    BackboneProvider,
    ImageInput,
    WeightsOptions,
    WeightsStatus,
)
from tlauto.errors import ConfigError, UnknownNameError, WeightsError
from tlauto.splits import split_of
from tlauto.testing.spaces import check_name, heavy_imports

if TYPE_CHECKING:
    import torch


class BackboneProviderSuite:
    """Subclass it, set `provider` and `example`, and pytest runs these tests on that backbone.

    class TestMine(BackboneProviderSuite):
        provider = MyProvider()
        example = "mine:tiny"

    Choose a small one. `weights` says where its pretrained weights come from; the default asks for
    random initialisation, which needs none. `weights_suffix` is that of the provider's files.
    """

    provider: BackboneProvider
    example: str
    weights: WeightsOptions = WeightsOptions(offline=True, pretrained=False)
    weights_suffix: str = ".safetensors"

    # --- names and facts ----------------------------------------------------------------------------

    def test_it_has_the_members_of_a_provider(self) -> None:
        assert isinstance(self.provider, BackboneProvider), (
            "it needs name, modality, shortlist(), find(), weights_status() and load()"
        )
        check_name(self.provider.name)

    def test_importing_it_and_its_shortlist_loads_no_heavy_library(self) -> None:
        module = type(self.provider).__module__
        assert heavy_imports(module) == [], f"import these inside functions of {module}"

    def test_its_shortlist_is_static_and_states_plausible_facts(self) -> None:
        infos = self.provider.shortlist()
        assert infos, "offer at least one backbone by default"
        assert infos == self.provider.shortlist(), "the shortlist changes between two calls"
        ids = [info.id for info in infos]
        assert len(set(ids)) == len(ids), "an id stands twice"
        assert sum(info.is_default for info in infos) <= 1, "only one can be the first choice"
        for info in infos:
            self._check_info(info)

    def test_every_backbone_of_the_shortlist_can_be_found(self) -> None:
        for info in self.provider.shortlist():
            assert [i.id for i in self.provider.find(info.name, self.weights)] == [info.id]

    def test_find_takes_globs_and_exact_names_and_sorts(self) -> None:
        name = self.example.partition(":")[2]
        everything = [info.id for info in self.provider.find("*", self.weights)]
        assert everything == sorted(set(everything)), "find() must sort by name and name each once"
        assert [info.id for info in self.provider.find(name, self.weights)] == [self.example]
        assert self.provider.find("no-such-*", self.weights) == ()
        for info in self.provider.find(f"{name[:3]}*", self.weights):
            self._check_info(info)

    def test_an_unknown_id_is_an_error_that_names_it(self) -> None:
        unknown = f"{self.provider.name}:no_such_backbone"
        for call in (self.provider.load, self.provider.weights_status):
            with pytest.raises(UnknownNameError, match="no_such_backbone"):
                call(unknown, self.weights)

    # --- weights ------------------------------------------------------------------------------------

    def test_it_says_whether_weights_can_be_had(self) -> None:
        status = self.provider.weights_status(self.example, self.weights)
        assert isinstance(status, WeightsStatus)
        assert status.state == "at_hand", f"the suite needs them at hand: {status.detail}"
        assert status.detail

    def test_a_missing_weights_file_is_named(self, tmp_path: Path) -> None:
        missing = tmp_path / f"nowhere{self.weights_suffix}"
        self._expect_weights_error(missing, "nowhere")

    def test_a_damaged_weights_file_is_named(self, tmp_path: Path) -> None:
        damaged = tmp_path / f"damaged{self.weights_suffix}"
        damaged.write_bytes(random.Random(0).randbytes(5000))
        self._expect_weights_error(damaged, "damaged")

    def test_weights_of_another_architecture_are_refused_and_named(self, tmp_path: Path) -> None:
        foreign = tmp_path / f"foreign{self.weights_suffix}"
        _write_foreign_weights(foreign)
        self._expect_weights_error(foreign, "foreign")

    # --- the network --------------------------------------------------------------------------------

    def test_it_builds_a_backbone(self) -> None:
        backbone = self._load()
        assert isinstance(backbone, Backbone), "it lacks members; tlauto.backbone.TorchBackbone has them all"
        _check_input(backbone.input)

    def test_its_stages_hold_every_parameter_exactly_once(self) -> None:
        backbone = self._load()
        staged = [name for stage in backbone.stages for name in stage]
        named = [name for name, _ in backbone.module.named_parameters()]
        assert sorted(staged) == sorted(named)
        assert all(backbone.stages), "a stage is empty"

    def test_its_features_have_the_shape_it_states(self) -> None:
        import torch

        backbone = self._load()
        backbone.set_training(False)
        with torch.no_grad():
            pooled = backbone.pooled(_images(backbone, 2))
            unpooled = backbone.unpooled(_images(backbone, 2))
        assert pooled.shape == (2, backbone.feature_shape.pooled)
        assert unpooled.shape == (2, *backbone.feature_shape.unpooled)
        assert torch.isfinite(pooled).all() and torch.isfinite(unpooled).all()

    def test_its_levels_have_the_form_it_states_and_end_with_the_pooled_features(self) -> None:
        import torch

        from tlauto.levels import Levelled, width_of

        backbone = self._load()
        if not isinstance(backbone, Levelled):
            return
        backbone.set_training(False)
        with torch.no_grad():
            images = _images(backbone, 2)
            levels, pooled = backbone.levels(images), backbone.pooled(images)
        shape = backbone.level_shape
        assert tuple(shape[-1]) == (backbone.feature_shape.pooled, 1)
        assert levels.shape == (2, width_of(shape, kind="grid"))
        assert torch.isfinite(levels).all()
        torch.testing.assert_close(levels[:, -shape[-1].channels :], pooled, rtol=1e-4, atol=1e-4)

    def test_in_inference_an_image_alone_has_the_features_it_has_among_others(self) -> None:
        import torch

        backbone = self._load()
        backbone.set_training(False)
        images = _images(backbone, 3)
        with torch.no_grad():
            together = backbone.pooled(images)
            alone = torch.cat([backbone.pooled(image[None]) for image in images])
        torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)

    def test_a_resizable_backbone_takes_other_sizes(self) -> None:
        import torch

        backbone = self._load()
        if not backbone.input.resizable:
            return
        backbone.set_training(False)
        with torch.no_grad():
            features = backbone.pooled(_images(backbone, 1, size=backbone.input.size + 32))
        assert features.shape == (1, backbone.feature_shape.pooled)

    def test_a_backbone_that_was_resized_states_its_features_anew(self) -> None:
        import torch

        from tlauto.levels import Levelled, width_of
        from tlauto.scales import at_scale, is_scalable, scaled

        backbone = self._load()
        if not is_scalable(backbone):
            return
        own, stages, pooled = backbone.input, backbone.stages, backbone.feature_shape.pooled
        backbone = at_scale(backbone, 1.4, id=self.example)
        assert backbone.input == scaled(own, 1.4) != own
        assert (backbone.stages, backbone.feature_shape.pooled) == (stages, pooled)
        backbone.set_training(False)
        with torch.no_grad():
            images = _images(backbone, 1)
            assert backbone.unpooled(images).shape == (1, *backbone.feature_shape.unpooled)
            if isinstance(backbone, Levelled):
                assert backbone.levels(images).shape == (1, width_of(backbone.level_shape, kind="grid"))

    def test_two_builds_have_the_same_names_and_with_one_seed_the_same_values(self) -> None:
        from tlauto.backbone import hash_weights

        first, second = self._load(seed=5), self._load(seed=5)
        assert list(first.module.state_dict()) == list(second.module.state_dict())
        assert first.stages == second.stages
        assert hash_weights(first) == hash_weights(second)

    def test_its_weights_survive_a_safetensors_file(self, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        saved, loaded = self._load(seed=1), self._load(seed=2)
        state = {name: tensor.contiguous() for name, tensor in saved.module.state_dict().items()}
        save_file(state, tmp_path / "backbone.safetensors")
        loaded.module.load_state_dict(load_file(tmp_path / "backbone.safetensors"))
        for backbone in (saved, loaded):
            backbone.set_training(False)
        with torch.no_grad():
            images = _images(saved, 2)
            torch.testing.assert_close(saved.pooled(images), loaded.pooled(images))

    # --- what learns --------------------------------------------------------------------------------

    def test_exactly_the_named_parameters_learn(self) -> None:
        backbone = self._load()
        for names in (backbone.stages[-1], (), backbone.stages[0], _all_names(backbone)):
            backbone.set_trainable(names)
            learning = {n for n, p in backbone.module.named_parameters() if p.requires_grad}
            assert learning == set(names)
        with pytest.raises(ConfigError, match="no_such_parameter"):
            backbone.set_trainable(["no_such_parameter"])

    def test_every_stage_gets_gradients_and_the_features_use_the_last(self) -> None:
        backbone = self._load()
        for features in (backbone.pooled, backbone.unpooled):
            backbone.set_trainable(_all_names(backbone))
            backbone.set_training(True)
            backbone.module.zero_grad(set_to_none=True)
            loss: Any = features(_images(backbone, 2)).square().sum()
            loss.backward()
            parameters = dict(backbone.module.named_parameters())
            for number, stage in enumerate(backbone.stages):
                assert any(parameters[name].grad is not None for name in stage), (
                    f"stage {number}: no gradient"
                )

    def test_a_frozen_backbone_gives_in_training_what_it_gives_in_inference(self) -> None:
        import torch

        backbone = self._load()
        images = _images(backbone, 4)
        backbone.set_trainable([])
        before = _buffers(backbone)
        with torch.no_grad():
            backbone.set_training(False)
            expected = backbone.pooled(images)
            backbone.set_training(True)
            # Dropout, stochastic depth and batch statistics would all show here.
            torch.testing.assert_close(backbone.pooled(images), expected)
        assert _moved(before, backbone) == [], "running statistics moved while the backbone was frozen"

    def test_running_statistics_move_only_where_all_their_layer_learns(self) -> None:
        backbone = self._load()
        vectors = [n for n, p in backbone.module.named_parameters() if p.ndim == 1 and n.endswith("bias")]
        for names in (vectors, backbone.stages[-1], _all_names(backbone)):
            backbone.set_trainable(names)
            backbone.set_training(True)
            before = _buffers(backbone)
            backbone.pooled(_images(backbone, 4))
            for buffer in _moved(before, backbone):
                owner = backbone.module.get_submodule(buffer.rpartition(".")[0])
                assert all(p.requires_grad for p in owner.parameters()), (
                    f"{buffer} moved, its layer is frozen"
                )

    def test_a_step_of_training_changes_what_learns_and_nothing_else(self) -> None:
        import torch

        backbone = self._load()
        backbone.set_trainable(backbone.stages[-1])
        backbone.set_training(True)
        before = {n: p.detach().clone() for n, p in backbone.module.named_parameters()}
        optimizer = torch.optim.SGD([p for p in backbone.module.parameters() if p.requires_grad], lr=0.1)
        loss: Any = backbone.unpooled(_images(backbone, 2)).square().mean()
        loss.backward()
        optimizer.step()
        changed = {n for n, p in backbone.module.named_parameters() if not torch.equal(p, before[n])}
        assert changed, "nothing of the last stage learned"
        assert changed <= set(backbone.stages[-1])

    def test_a_split_it_offers_gives_what_the_whole_gives(self) -> None:
        import torch

        from tlauto.backbone import agree

        backbone = self._load()
        backbone.set_training(False)
        images = _images(backbone, 3)
        with torch.no_grad():
            whole = backbone.pooled(images), backbone.unpooled(images)
        for stage in range(1, len(backbone.stages)):
            split = split_of(backbone, stage)
            if split is None:
                continue
            backbone.set_trainable([name for names in backbone.stages[stage:] for name in names])
            activations = split.prefix(images)
            assert not activations.requires_grad, f"what learns from stage {stage} on is used before it"
            assert len(activations) == len(images), f"stage {stage}: one row for each image"
            for kind, expected in zip(("pooled", "unpooled"), whole, strict=True):
                with torch.no_grad():
                    found = split.suffix(activations.clone(), cast(Any, kind))
                assert agree(found, expected), f"split before stage {stage}, {kind} features differ"

    def _load(self, *, seed: int = 0) -> Backbone:
        import torch

        torch.manual_seed(seed)
        return self.provider.load(self.example, self.weights)

    def _expect_weights_error(self, file: Path, name: str) -> None:
        options = WeightsOptions(files={self.example: os.fspath(file)}, offline=True)
        with pytest.raises(WeightsError, match=name):
            self.provider.load(self.example, options)

    def _check_info(self, info: BackboneInfo) -> None:
        assert info.provider == self.provider.name and info.name, f"'{info.id}' is not '<provider>:<name>'"
        for value in (info.params_m, info.gmacs, info.cost):
            assert value is None or value > 0, f"{info.id}: {value}"
        assert info.accuracy is None or 0 < info.accuracy <= 1, f"{info.id}: top-1 is a fraction"
        assert info.input_size >= 16 and info.licence and info.pretraining


def _check_input(wanted: ImageInput) -> None:
    assert wanted.size >= 16
    assert wanted.fit in ("crop", "squash", "border")
    assert wanted.resize > 0.5 * wanted.size, "`resize` is the edge before the crop to `size`, in pixels"
    assert wanted.interpolation in ("nearest", "bilinear", "bicubic", "lanczos")
    assert len(wanted.mean) == len(wanted.std) == 3 and all(value > 0 for value in wanted.std)


def _images(backbone: Backbone, n: int, *, size: int | None = None) -> torch.Tensor:
    import torch

    side = size or backbone.input.size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def _all_names(backbone: Backbone) -> list[str]:
    return [name for stage in backbone.stages for name in stage]


def _buffers(backbone: Backbone) -> dict[str, torch.Tensor]:
    # Keras holds its running statistics as parameters that never learn.
    tensors = {**dict(backbone.module.named_buffers()), **dict(backbone.module.named_parameters())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _moved(before: dict[str, torch.Tensor], backbone: Backbone) -> list[str]:
    import torch

    after = _buffers(backbone)
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


def _write_foreign_weights(path: Path) -> None:
    """A readable file with one tensor that no network has."""
    import torch

    tensors = {"some.other.network.weight": torch.zeros(3, 5)}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    elif path.suffix == ".h5":
        import h5py

        with h5py.File(path, "w") as file:
            file.create_group("some_other_layer").attrs["weight_names"] = [b"kernel"]
            file.attrs["layer_names"] = [b"some_other_layer"]
            file["some_other_layer"]["kernel"] = tensors["some.other.network.weight"].numpy()
    else:
        torch.save(tensors, path)
