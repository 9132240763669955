"""Random numbers from keys: known values, even, unrelated, and the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tlauto.training.draws import keys_of, uniforms


def test_the_sequence_of_an_empty_key_is_that_of_splitmix64_with_seed_0() -> None:
    # The first numbers of the authors' own program.
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    expected = [(number >> 11) / 2**53 for number in known]
    assert uniforms(np.empty((1, 0), np.uint64), 4).tolist() == [expected]


def test_an_images_numbers_are_the_same_in_any_batch_and_at_any_place() -> None:
    keys = keys_of((3, 1, 4), 40)
    drawn, order = uniforms(keys, 7), np.random.default_rng(0).permutation(40)
    assert np.array_equal(uniforms(keys[order], 7), drawn[order])
    assert np.array_equal(uniforms(keys[11:12], 7), drawn[11:12])
    assert np.array_equal(uniforms(keys, 3), drawn[:, :3])


def test_every_word_of_a_key_and_their_order_matter() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0), (0, 2**63, 0)]
    drawn = uniforms(np.array(keys, np.uint64), 2)
    assert len(np.unique(drawn)) == drawn.size
    assert np.all((drawn >= 0) & (drawn < 1))


@pytest.mark.parametrize("column", range(4))
def test_neighbouring_keys_draw_evenly(column: int) -> None:
    drawn = np.concatenate([uniforms(keys_of((0, 1, batch), 32), 4)[:, column] for batch in range(400)])
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 0.001


def test_numbers_of_one_image_and_of_neighbours_are_unrelated() -> None:
    drawn = uniforms(keys_of((0,), 20_000), 6)
    seen = np.concatenate([drawn[:-1], drawn[1:]], axis=1)  # an image's numbers, and the next one's
    related = np.corrcoef(seen, rowvar=False) - np.eye(12)
    assert np.abs(related).max() < 5 / np.sqrt(20_000)


def test_keys_are_the_words_and_the_place() -> None:
    assert keys_of((7, 2), 3).tolist() == [[7, 2, 0], [7, 2, 1], [7, 2, 2]]
