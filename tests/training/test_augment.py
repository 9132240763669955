"""Augmentation: stronger by level, and repeatable however the threads are scheduled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tlauto.contracts import ImageInput
from tlauto.recipe import AUGMENT_LEVELS
from tlauto.training.augment import LEVELS, TRIVIAL, Augment, mixup
from tlauto.training.batches import Stream, augmented_batches
from tlauto.training.pixels import Pixels, centre_crop

INPUT = ImageInput(size=32, resize=40)


@pytest.fixture
def windows() -> np.ndarray:
    """Smooth random images (12, 40, 40, 3): augmenting noise would say nothing."""
    coarse = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (40, 40), mode="bilinear")
    return (smooth * 255).byte().permute(0, 2, 3, 1).numpy()


def test_every_level_of_the_recipe_exists() -> None:
    assert tuple(LEVELS) == AUGMENT_LEVELS


@pytest.mark.parametrize("level", AUGMENT_LEVELS)
def test_augmented_images_are_crops_of_the_same_type(level: str, windows: np.ndarray) -> None:
    augment = Augment(level, INPUT)
    for seed in range(60):
        image = augment(windows[seed % 12], np.random.default_rng(seed))
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.uint8


def test_no_augmentation_is_the_centre_crop(windows: np.ndarray) -> None:
    image = Augment("none", INPUT)(windows[0], np.random.default_rng(0))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), centre_crop(windows[0], INPUT))


def test_levels_change_images_more_and_more(windows: np.ndarray) -> None:
    changes = []
    for level in AUGMENT_LEVELS:
        augment = Augment(level, INPUT)
        difference = [
            np.abs(
                augment(window, np.random.default_rng([seed, i])).permute(1, 2, 0).numpy().astype(float)
                - centre_crop(window, INPUT)
            ).mean()
            for i, window in enumerate(windows)
            for seed in range(40)
        ]
        changes.append(float(np.mean(difference)))
    assert changes[0] == 0
    assert changes == sorted(changes)


@pytest.mark.parametrize("operator", range(len(TRIVIAL)))
@pytest.mark.parametrize("share", [-1.0, 0.0, 0.5, 1.0])
def test_every_trivial_operator_works_over_its_whole_range(
    operator: int, share: float, windows: np.ndarray
) -> None:
    apply, strongest, is_signed = TRIVIAL[operator]
    image = torch.from_numpy(windows[0]).permute(2, 0, 1)
    result = apply(image, (share if is_signed else abs(share)) * strongest)
    assert result.shape == image.shape
    assert result.dtype == torch.uint8


@pytest.mark.parametrize("level", ["light", "strong"])
def test_the_same_seed_gives_the_same_batches_on_any_number_of_threads(
    level: str, windows: np.ndarray
) -> None:
    pixels, augment = Pixels([windows], INPUT), Augment(level, INPUT)
    batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            runs.append(list(augmented_batches(pixels, batches, augment, seed=(0, 1))))
    finally:
        torch.set_num_threads(before)
    assert [indices for indices, _ in runs[0]] == batches
    for (_, one), (_, four) in zip(*runs, strict=True):
        assert torch.equal(one, four)
    other = list(augmented_batches(pixels, batches, augment, seed=(0, 2)))
    assert not torch.equal(runs[0][0][1], other[0][1]), "another epoch must draw anew"


def test_an_image_that_cannot_be_prepared_raises_in_the_consumer(windows: np.ndarray) -> None:
    with pytest.raises(IndexError):
        list(augmented_batches(Pixels([windows], INPUT), [[99]], Augment("light", INPUT), seed=(0,)))


def test_mixup_mixes_images_and_targets_alike() -> None:
    images = torch.eye(4).reshape(4, 1, 2, 2)
    mixed, soft = mixup(images, torch.eye(4), 0.2, np.random.default_rng(3))
    assert torch.allclose(mixed.reshape(4, 4), soft)
    assert torch.allclose(soft.sum(1), torch.ones(4))


def test_a_stream_shuffles_without_loss_and_repeats_by_seed() -> None:
    stream = Stream(10, seed=1)
    taken = [stream.take(4) for _ in range(5)]
    assert sorted(index for batch in taken for index in batch) == sorted([*range(10), *range(10)])
    again = Stream(10, seed=1)
    assert [again.take(4) for _ in range(5)] == taken
    other = Stream(10, seed=2)
    assert [other.take(4) for _ in range(5)] != taken


def test_a_stream_of_three_fills_a_batch_of_three() -> None:
    assert sorted(Stream(3, seed=0).take(3)) == [0, 1, 2]
