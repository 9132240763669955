"""Augmentation: stronger by level, evenly drawn, and the same for an image whatever is beside it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from tlauto.contracts import ImageInput
from tlauto.recipe import AUGMENT_LEVELS
from tlauto.training.augment import DRAWS, LEVELS, Augment, mixup, trivial_draws
from tlauto.training.batches import LOOK_AHEAD, Stream, ahead, augmented_batches, normalise
from tlauto.training.draws import keys_of, uniforms
from tlauto.training.operators import TRIVIAL
from tlauto.training.pixels import Pixels, centre_crop

INPUT = ImageInput(size=32, resize=40)
CPU = torch.device("cpu")
META = torch.device("meta")  # shapes without numbers; all that is not the CPU goes the same way
DEVICES = (CPU, META)
AUGMENTED = AUGMENT_LEVELS[1:]


@pytest.fixture
def windows() -> np.ndarray:
    """Smooth random images (12, 40, 40, 3): augmenting noise would say nothing."""
    coarse = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (40, 40), mode="bilinear")
    return (smooth * 255).byte().permute(0, 2, 3, 1).numpy()


def augmented(level: str, windows: np.ndarray, keys: np.ndarray) -> torch.Tensor:
    """Crops (N, 3, 32, 32) from 0 to 255."""
    augment = Augment(level, INPUT)
    plan = augment.plan(keys)
    assert plan is not None
    return augment(torch.from_numpy(windows), plan)


def batches_of(
    level: str,
    windows: np.ndarray,
    batches: list[list[int]],
    *,
    epoch: int = 1,
    image_input: ImageInput = INPUT,
    device: torch.device = CPU,
) -> list[torch.Tensor]:
    """What the trainer gets in an epoch."""
    pixels, augment = Pixels([windows], image_input), Augment(level, image_input)

    def keys(batch: int) -> np.ndarray:
        return keys_of((0, epoch, batch), len(batches[batch]))

    indices, images = zip(*augmented_batches(pixels, batches, augment, keys, device), strict=True)
    assert list(indices) == batches
    return list(images)


def test_every_level_of_the_recipe_exists() -> None:
    assert tuple(LEVELS) == AUGMENT_LEVELS


@pytest.mark.parametrize("level", AUGMENTED)
def test_augmented_images_are_crops_from_0_to_255(level: str, windows: np.ndarray) -> None:
    for seed in range(40):
        images = augmented(level, windows, keys_of((seed,), 12))
        assert images.shape == (12, 3, 32, 32) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 255


@pytest.mark.parametrize("bgr", [False, True])
def test_no_augmentation_is_the_centre_crop_to_the_last_bit(bgr: bool, windows: np.ndarray) -> None:
    image_input = replace(INPUT, bgr=bgr)
    (images,) = batches_of("none", windows, [[3, 1, 4, 1]], image_input=image_input)
    crops = np.stack([centre_crop(windows[i], INPUT) for i in (3, 1, 4, 1)])
    expected = normalise(torch.from_numpy(crops).permute(0, 3, 1, 2), image_input, CPU)
    assert torch.equal(images, expected)
    assert images.stride() == expected.stride()


@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("level", AUGMENTED)
def test_batches_are_normalised(level: str, bgr: bool, windows: np.ndarray) -> None:
    image_input = replace(INPUT, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), bgr=bgr)
    (images,) = batches_of(level, windows, [list(range(12))], image_input=image_input)
    crops = augmented(level, windows, keys_of((0, 1, 0), 12)) / 255
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (image_input.mean, image_input.std))
    assert torch.allclose(images, ((crops.flip(1) if bgr else crops) - mean) / std, atol=1e-6)


def test_levels_change_images_more_and_more(windows: np.ndarray) -> None:
    plain = torch.from_numpy(centre_crop(windows, INPUT)).permute(0, 3, 1, 2).float()
    changes = []
    for level in AUGMENTED:
        images = [augmented(level, windows, keys_of((seed,), 12)) for seed in range(40)]
        changes.append((torch.stack(images) - plain).abs().mean().item())
    assert changes == sorted(changes) and changes[0] > 0


@pytest.mark.parametrize("level", AUGMENTED)
def test_an_image_is_augmented_the_same_whatever_its_batch(level: str, windows: np.ndarray) -> None:
    keys, order = keys_of((5,), 12), np.random.default_rng(0).permutation(12)
    together = augmented(level, windows, keys)
    assert torch.equal(augmented(level, windows[order], keys[order]), together[order])
    for i in range(12):
        assert torch.equal(augmented(level, windows[i : i + 1], keys[i : i + 1])[0], together[i])


@pytest.mark.parametrize("level", AUGMENTED)
def test_the_same_seed_gives_the_same_batches_on_any_number_of_threads(
    level: str, windows: np.ndarray
) -> None:
    batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            runs.append(batches_of(level, windows, batches))
    finally:
        torch.set_num_threads(before)
    for one, four in zip(*runs, strict=True):
        assert torch.equal(one, four)
    other = batches_of(level, windows, batches, epoch=2)
    assert not torch.equal(runs[0][0], other[0]), "another epoch must draw anew"
    assert not torch.equal(*batches_of(level, windows, [[0, 1], [0, 1]])), "so must another batch"


# --- what is drawn ----------------------------------------------------------------------------------


def draws(count: int) -> dict[str, np.ndarray]:
    return dict(zip(DRAWS, uniforms(keys_of((0,), count), len(DRAWS)).T, strict=True))


def test_each_of_trivialaugments_operators_is_chosen_about_evenly() -> None:
    kinds, strengths = trivial_draws(draws(14_000))
    assert stats.chisquare(np.bincount(kinds, minlength=len(TRIVIAL))).pvalue > 0.001
    for kind, operator in enumerate(TRIVIAL):
        found = strengths[kinds == kind]
        most, least = operator.strongest, -operator.strongest if operator.is_signed else 0.0
        assert found.min() >= least and found.max() <= most
        if most:
            counts, _ = np.histogram(found, bins=10, range=(least, most))
            assert stats.chisquare(counts).pvalue > 0.001, operator.name


def test_each_image_has_one_operator_of_trivialaugment() -> None:
    plan = Augment("strong", INPUT).plan(keys_of((0,), 2000))
    assert plan is not None
    kinds, _ = trivial_draws(draws(2000))
    expected = {o.change: int((kinds == kind).sum()) for kind, o in enumerate(TRIVIAL) if o.change}
    assert dict(plan.changes) == expected
    assert len(plan.rows.unique()) == len(plan.rows) == len(plan.strengths) == sum(expected.values())
    moved = [kind for kind, o in enumerate(TRIVIAL) if o.name.startswith(("shear", "shift", "rotate"))]
    is_turned = (plan.matrices[:, [0, 1], [1, 0]] != 0).any(1).numpy()
    assert not is_turned[~np.isin(kinds, moved)].any()


@pytest.mark.parametrize("level", AUGMENTED)
def test_crops_stay_in_the_window_and_are_as_large_as_the_level_says(level: str) -> None:
    plain = replace(LEVELS[level], shear=0.0, trivial=False)
    augment = Augment(level, INPUT)
    augment.level = plain
    plan = augment.plan(keys_of((1,), 5000))
    assert plan is not None
    scale, shift = plan.matrices[:, [0, 1], [0, 1]], plan.matrices[:, :, 2]
    assert (scale.abs() + shift.abs()).max() <= 1 + 1e-6, "nothing beyond the window is seen"
    area, ratio = scale.prod(1).abs(), (scale[:, 0] / scale[:, 1]).abs()
    assert plain.area / plain.ratio <= area.min() and area.min() < plain.area + 0.02 and area.max() > 0.95
    assert ratio.max() <= plain.ratio + 1e-5 and ratio.min() >= 1 / plain.ratio - 1e-5
    assert (scale[:, 0] < 0).float().mean().item() == pytest.approx(0.5, abs=0.03), "half are flipped"


# --- looking ahead ----------------------------------------------------------------------------------


def test_an_image_that_cannot_be_prepared_raises_in_the_consumer(windows: np.ndarray) -> None:
    with pytest.raises(IndexError):
        batches_of("light", windows, [[99]])


def test_on_a_cpu_no_thread_is_started(windows: np.ndarray) -> None:
    pixels, augment, before = Pixels([windows], INPUT), Augment("light", INPUT), threading.active_count()
    for _ in augmented_batches(pixels, [[0]] * 4, augment, lambda batch: keys_of((batch,), 1), CPU):
        assert threading.active_count() == before


@pytest.mark.parametrize("level", AUGMENT_LEVELS)
def test_elsewhere_than_on_a_cpu_one_thread_prepares_and_ends_when_the_consumer_stops(
    level: str, windows: np.ndarray
) -> None:
    pixels, augment, before = Pixels([windows], INPUT), Augment(level, INPUT), threading.active_count()
    prepared = augmented_batches(pixels, [[0, 1, 2]] * 9, augment, lambda batch: keys_of((batch,), 3), META)
    indices, images = next(prepared)
    assert indices == [0, 1, 2] and images.shape == (3, 3, 32, 32) and images.device.type == "meta"
    assert threading.active_count() == before + 1
    prepared.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("level", AUGMENT_LEVELS)
def test_a_gpu_makes_the_same_images(level: str, windows: np.ndarray) -> None:
    batches = [list(range(12))] * 5
    ours = torch.cat(batches_of(level, windows, batches))
    theirs = torch.cat(batches_of(level, windows, batches, device=torch.device("cuda"))).cpu()
    # Rounding decides where a value is next to one at which an operator jumps.
    assert ((ours - theirs).abs() > 1e-3).float().mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_batches_come_in_order_and_few_are_made_ahead(count: int, device: torch.device) -> None:
    most = 0 if device == CPU else LOOK_AHEAD
    before, made, threads = threading.active_count(), [], set()

    def make(number: int) -> int:
        made.append(number)
        threads.add(threading.get_ident())
        return 10 * number

    for taken, value in enumerate(ahead(make, count, device=device)):
        assert value == 10 * taken
        assert len(made) <= taken + 1 + most
        assert threading.active_count() <= before + bool(most)
    assert made == list(range(count))
    assert len(threads) == min(count, 1), "one thread makes them all"
    assert threading.active_count() == before


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_is_raised_where_its_batch_would_have_come_and_ends_the_thread(device: torch.device) -> None:
    before, taken = threading.active_count(), []

    def make(number: int) -> int:
        if number == 3:
            raise OSError("gone")
        return number

    with pytest.raises(OSError, match="gone"):
        for number in ahead(make, 9, device=device):
            taken.append(number)
    assert taken == [0, 1, 2]
    assert threading.active_count() == before


@pytest.mark.parametrize("device", DEVICES)
def test_who_stops_early_ends_the_thread(device: torch.device) -> None:
    before, made = threading.active_count(), []
    prepared = ahead(lambda number: made.append(number), 100, device=device)
    next(prepared)
    prepared.close()
    assert threading.active_count() == before
    assert len(made) <= 1 + LOOK_AHEAD


class WatchedPixels(Pixels):
    """Counts how many of the batches of windows that it gave away are still there."""

    def __init__(self, windows: np.ndarray) -> None:
        super().__init__([windows], INPUT)
        self.given: list[weakref.ref[torch.Tensor]] = []

    def windows(self, indices: Sequence[int]) -> torch.Tensor:
        given = super().windows(indices)
        self.given.append(weakref.ref(given))
        return given

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.given)


def test_no_more_than_the_batch_at_hand_is_kept(windows: np.ndarray) -> None:
    pixels, augment = WatchedPixels(windows), Augment("strong", INPUT)
    for _ in augmented_batches(pixels, [[0, 1]] * 9, augment, lambda batch: keys_of((batch,), 2), CPU):
        assert pixels.alive <= 1
    assert len(pixels.given) == 9


# --- mixup and the order of images ------------------------------------------------------------------


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
