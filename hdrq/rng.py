"""The random stream: a state of three integers, and Philox4x32-7 over it.

Noise is a function. Element ``e`` of a tensor (its index in contiguous, row-major order) takes the 32-bit word

    philox(key = (seed & 0xffffffff, seed >> 32), counter = (lo32(e >> 2), hi32(e >> 2), stream, step))[e & 3]

and nothing else decides it: not the block size, the number of threads, the device or the strides. A backward pass
regenerates the words of its forward pass, so none are stored.

A second draw for the same element, which decides whether it is dropped, takes 16 bits of ``stream ^ 0x80000000``:

    coin(e) = (word(e >> 1) >> (16·(e & 1))) & 0xffff

Source: Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Random123), where seven
rounds are the fewest that pass BigCrush.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hdrq import checks

CONTRACT = 2  # contract 1 had ten rounds, and coins of 24 bits of a word each
ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of counter words 0 and 2
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1: added to the key after each round
DROP_STREAM = 0x80000000  # stream bit of the second, independent draw for the same element
KEEP_ALL = 2**16  # the threshold below which every coin is
LOW = 0xFFFFFFFF


def rng_state(seed: int, stream: int = 0, step: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """The state that every random op takes: an int64 tensor ``(seed, stream, step)`` of shape (3,) on ``device``.

    Args:
        seed: 64 bits, 0 ≤ seed < 2⁶⁴ (from 2⁶³ on it is stored as its two's complement).
        stream: 32 bits: which tensor draws.
        step: 32 bits: which iteration or draw. Advance it in place, ``state[2] += 1``: it stays on its device, so a
            captured CUDA graph draws anew at each replay. Ops read it modulo 2³².

    Raises:
        TypeError, ValueError: an argument is not an integer, or out of range.
    """
    checks.integer("seed", seed, 0, 2**64 - 1)
    checks.integer("stream", stream, 0, LOW)
    checks.integer("step", step, 0, LOW)
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([signed, stream, step], dtype=torch.int64, device=device)


def philox(key: tuple[int, int], counter: tuple) -> tuple:
    """Philox4x32-7 in NumPy: four uint32 words for each 128-bit counter.

    ``key`` is two 32-bit integers; ``counter`` is four 32-bit words, each an integer or an array (broadcast). Every
    round is ``(c0, c1, c2, c3) → (hi(M₁c2) ^ c1 ^ k0, lo(M₁c2), hi(M₀c0) ^ c3 ^ k1, lo(M₀c0))``.
    """
    k0, k1 = key
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    low, shift = np.uint64(LOW), np.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def words(rng: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """The stream's uint32 words of elements ``start … start + count − 1``, in NumPy. ``rng`` is the state's array."""
    seed, stream, step = (int(v) for v in rng)
    group = np.arange(start >> 2, (start + count + 3) >> 2, dtype=np.uint64)
    counter = (group & np.uint64(LOW), group >> np.uint64(32), stream & LOW, step & LOW)
    four = np.stack(philox((seed & LOW, (seed >> 32) & LOW), counter), axis=-1)
    return four.reshape(-1)[start & 3 :][:count]


def coins(rng: np.ndarray, count: int) -> np.ndarray:
    """The 16-bit coins of elements ``0 … count − 1``, in NumPy."""
    seed, stream, step = (int(v) for v in rng)
    word = words(np.array([seed, stream ^ DROP_STREAM, step], dtype=np.int64), (count + 1) >> 1)
    return np.stack((word & np.uint32(0xFFFF), word >> np.uint32(16)), axis=-1).reshape(-1)[:count]


def torch_words(rng: torch.Tensor, count: int) -> torch.Tensor:
    """:func:`words` in plain torch, on the device of ``rng``, without reading it on the host: int64 in [0, 2³²)."""
    seed, stream, step = rng.unbind()
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    group = torch.arange((count + 3) >> 2, device=rng.device)
    c0, c1, c2, c3 = group & LOW, group >> 32, stream & LOW, step & LOW
    for _ in range(ROUNDS):
        # A product of two 32-bit words wraps in int64, but its 64 bits are right: the mask undoes the signed shift.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return torch.stack((c0, c1, c2, c3), dim=-1).reshape(-1)[:count]


def torch_coins(rng: torch.Tensor, count: int) -> torch.Tensor:
    """:func:`coins` in plain torch: int64 in [0, 2¹⁶)."""
    seed, stream, step = rng.unbind()
    word = torch_words(torch.stack((seed, stream ^ DROP_STREAM, step)), (count + 1) >> 1)
    return torch.stack((word & 0xFFFF, word >> 16), dim=-1).reshape(-1)[:count]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Inside, what a model draws from PyTorch's global generators is undone at the end."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
