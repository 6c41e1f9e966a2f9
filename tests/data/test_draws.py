"""Draws of the host: pure functions of (seed, stream, position)."""

import numpy as np

from diffjax.data import draws


def test_words_are_those_of_philox_for_ever():
    """The raw words are part of every saved data position: another generator would be another stream."""
    words = draws.philox(3, "flip", block=2, counter=5).random_raw(2)
    assert [int(word) for word in words] == [10302673647806194696, 4566637075945561071]


def test_permutation_is_a_permutation_and_differs_by_seed_stream_and_block():
    orders = [
        draws.permutation(*key, 50) for key in ((0, "order", 0), (1, "order", 0), (0, "split", 0), (0, "order", 1))
    ]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 4


def test_coins_belong_to_positions():
    coins = draws.coins(7, "flip", 0, 4000)
    np.testing.assert_array_equal(draws.coins(7, "flip", 1234, 100), coins[1234:1334])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    assert (draws.coins(8, "flip", 0, 4000) != coins).any()


def test_negative_seeds_are_seeds():
    assert (draws.coins(-1, "flip", 0, 64) != draws.coins(1, "flip", 0, 64)).any()
