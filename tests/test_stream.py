"""Statistics of the random stream, over a million words each: what a faulty round, key or counter would show.

Bounds are five standard deviations of the statistic under true randomness. All seeds are fixed, so a pass is a pass.
"""

import numpy as np
import pytest

from hdrq.rng import coins, philox, words

COUNT = 2**20
STATE = (2024, 3, 7)
SIGMAS = 5.0


def uniform(state, count=COUNT):
    """Words in [−½, ½)."""
    return words(np.array(state, dtype=np.int64), count) / 2.0**32 - 0.5


def correlation(a, b):
    """In standard deviations, of uniforms on [−½, ½): their product has the variance 1/144 if they are independent."""
    return (a * b).mean() * 12 * len(a) ** 0.5


def correlation_of_spread(a, b):
    """The same of a² − 1/12, whose variance is 1/180, and b."""
    return ((a * a - 1 / 12) * b).mean() * (12 * 180) ** 0.5 * len(a) ** 0.5


def neighbours(state, apart):
    u = uniform(state)
    return u[:-apart], u[apart:]


PAIRS = {
    **{f"elements {apart} apart": neighbours(STATE, apart) for apart in (1, 2, 3, 4, 5, 8, 64, 1024, 2**16)},
    **{
        f"seeds {2**bit} apart": (uniform(STATE), uniform((STATE[0] ^ 2**bit, *STATE[1:])))
        for bit in (0, 1, 31, 32, 62)
    },
    **{f"streams {2**bit} apart": (uniform(STATE), uniform((2024, 3 ^ 2**bit, 7))) for bit in (0, 1, 15, 16, 31)},
    **{f"steps {2**bit} apart": (uniform(STATE), uniform((2024, 3, 7 ^ 2**bit))) for bit in (0, 1, 15, 16, 31)},
    "seed and stream exchanged": (uniform((3, 2024, 7)), uniform(STATE)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_are_uncorrelated(pair):
    a, b = PAIRS[pair]
    assert abs(correlation(a, b)) < SIGMAS
    assert abs(correlation_of_spread(a, b)) < SIGMAS


def chi_square(cells, count):
    """In standard deviations, of counts that are equally likely."""
    counts = np.bincount(cells, minlength=count)
    expected = len(cells) / count
    return ((counts - expected) ** 2 / expected).sum() / (2 * count) ** 0.5 - (count / 2) ** 0.5


@pytest.mark.parametrize("dimensions, bits", [(1, 12), (2, 6), (3, 4), (4, 3)])
@pytest.mark.parametrize("shift", [0, 8, 20])
def test_points_of_neighbours_fill_the_cube_evenly(dimensions, bits, shift):
    """``bits`` bits of each of so many neighbours, from bit ``shift`` down: high bits and low ones alike."""
    word = words(np.array(STATE, dtype=np.int64), 4 * COUNT)
    part = (word << np.uint32(shift) >> np.uint32(32 - bits)).reshape(-1, 4)[:, :dimensions].astype(np.int64)
    cells = part @ (1 << bits * np.arange(dimensions))
    assert abs(chi_square(cells, 1 << bits * dimensions)) < SIGMAS


@pytest.mark.parametrize("which", ["stream", "step", "seed"])
def test_points_of_neighbouring_streams_fill_the_cube_evenly(which):
    at = ("seed", "stream", "step").index(which)
    states = [tuple(value + k * (place == at) for place, value in enumerate(STATE)) for k in range(3)]
    high = [words(np.array(state, dtype=np.int64), COUNT).astype(np.int64) >> 28 for state in states]
    assert abs(chi_square(high[0] | high[1] << 4 | high[2] << 8, 1 << 12)) < SIGMAS


def test_coins_are_even_and_follow_neither_the_noise_nor_each_other():
    state = np.array(STATE, dtype=np.int64)
    coin, noise = coins(state, COUNT).astype(np.int64), uniform(STATE)
    assert coin.min() == 0 and coin.max() == 2**16 - 1
    assert abs(chi_square(coin, 2**16)) < SIGMAS
    fair = coin / 2.0**16 - 0.5
    assert abs(correlation(fair, noise)) < SIGMAS
    for apart in (1, 2, 7, 8, 1024):
        assert abs(correlation(fair[:-apart], fair[apart:])) < SIGMAS
    cells = (coin >> 10) | (words(state, COUNT).astype(np.int64) >> 26) << 6
    assert abs(chi_square(cells, 1 << 12)) < SIGMAS


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_noise_of_what_is_kept_is_uniform(keep):
    state = np.array(STATE, dtype=np.int64)
    kept = coins(state, COUNT) < round(keep * 2**16)
    assert abs(kept.mean() - keep) < SIGMAS * (keep * (1 - keep) / COUNT) ** 0.5
    cells = words(state, COUNT)[kept].astype(np.int64) >> 22
    assert abs(chi_square(cells, 1 << 10)) < SIGMAS


def test_every_bit_of_every_counter_and_key_word_moves_half_the_bits():
    """Avalanche: of 128 output bits, in the mean 64 ± 5·√(32/1024) change, for each input bit."""
    draw = np.random.default_rng(5)
    for bit in range(192):
        word, at = divmod(bit, 32)
        inputs = draw.integers(0, 2**32, (6, 1024), dtype=np.uint64)
        other = inputs.copy()
        other[word] ^= np.uint64(1 << at)
        changed = 0
        for i in range(0, 1024, 128):  # keys are one to a call
            key, second = (tuple(int(k) for k in part[4:, i]) for part in (inputs, other))
            one = philox(key, tuple(inputs[:4, i : i + 128]))
            two = philox(second, tuple(other[:4, i : i + 128]))
            changed += sum(int(np.unpackbits((a ^ b).view(np.uint8)).sum()) for a, b in zip(one, two, strict=True))
        assert abs(changed / 1024 - 64) < SIGMAS * (32 / 1024) ** 0.5
