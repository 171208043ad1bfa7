import numpy as np
import pytest
import torch
from oracle.contract import word

from hdrq import rng, rng_state

# Random123, kat_vectors: philox4x32, 7 rounds.
VECTORS = [
    ((0, 0), (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), VECTORS)
def test_philox_gives_the_published_vectors(key, counter, expected):
    assert tuple(int(w) for w in rng.philox(key, counter)) == expected


@pytest.mark.parametrize("state", [(0, 0, 0), (2**63 - 1, 2**32 - 1, 2**32 - 1), (2**64 - 1, 7, 1), (12345, 3, 99)])
def test_words_follow_the_contract_in_numpy_and_torch(state):
    expected = [word(*state, e) for e in range(50)]
    assert rng.words(rng_state(*state).numpy(), 50).tolist() == expected
    assert rng.torch_words(rng_state(*state), 50).tolist() == expected


@pytest.mark.parametrize("start", [1, 4, 2**31 - 3, 2**34 - 2, 2**40 + 5])
def test_words_far_into_a_tensor(start):
    state = rng_state(77, 5, 6)
    assert rng.words(state.numpy(), 9, start=start).tolist() == [word(77, 5, 6, start + i) for i in range(9)]


def test_stream_and_step_count_modulo_two_to_the_32():
    beyond = torch.tensor([5, 2**32 + 1, 2**32 + 2])
    assert np.array_equal(rng.words(beyond.numpy(), 16), rng.words(rng_state(5, 1, 2).numpy(), 16))
    assert torch.equal(rng.torch_words(beyond, 16), rng.torch_words(rng_state(5, 1, 2), 16))


@pytest.mark.parametrize("arguments", [(-1,), (2**64,), (0, 2**32), (0, -1), (0, 0, 2**32)])
def test_state_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"must be in \[0, \d+\], got"):
        rng_state(*arguments)


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_seed_must_be_an_integer(seed):
    with pytest.raises(TypeError, match="seed must be an int, got"):
        rng_state(seed)
