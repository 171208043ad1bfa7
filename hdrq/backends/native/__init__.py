"""The C++ path, for CPU tensors: thin wrappers that allocate results and hand addresses to ``hdrq._C``.

The same signatures and the same bits as :mod:`hdrq.backends.reference`. Work is split over
:func:`threads` threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

import hdrq._C as _C

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Float of csrc/kernels.h
CODES = {torch.int8: 0, torch.int16: 1}  # enum Code
PACKED = {True: 2, False: 3}  # enum Code: two 4-bit codes to a byte, signed or not

LARGE = 8 << 20  # bytes from which the pages of a result are worth a hint
PROCESS = os.getpid()  # the one that imported this, and whose OpenMP has threads


def empty(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a result."""
    return _to_be_written(torch.empty(shape, dtype=dtype))


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """The same for a result like x, which is contiguous: a third of the price."""
    return _to_be_written(torch.empty_like(x))


def _to_be_written(result: torch.Tensor) -> torch.Tensor:
    if result.nbytes >= LARGE:
        _C.expect_writes(result.data_ptr(), result.nbytes)
    return result


def threads() -> int:
    """torch's number of threads; 1 in a forked child, where OpenMP waits for threads that only the parent has."""
    return torch.get_num_threads() if os.getpid() == PROCESS else 1


def job(x: torch.Tensor) -> _C.Job:
    """How many elements, over how many threads."""
    return _C.Job(x.numel(), threads())


def layout(x: torch.Tensor, axis: int | None) -> tuple[int, int]:
    """Channels, and how many consecutive elements share one: element e has the channel ``(e // inner) % channels``."""
    return (1, x.numel()) if axis is None else (x.shape[axis], x.shape[axis + 1 :].numel())


def grid(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, qmin: int, qmax: int, axis) -> _C.Grid:
    """The scale of each element, and the range. The tensors must outlive the call that takes it."""
    return _C.Grid(scale.data_ptr(), address(zero_point), *layout(x, axis), qmin, qmax)


def quantizer(
    x,
    scale,
    zero_point,
    qmin,
    qmax,
    axis,
    rng,
    threshold,
    *,
    noise,
    cumulative=None,
    source=None,
    rounding=0,
    gradient=0,
):
    """A tensor to quantize, for :func:`forward` and :func:`backward`; the tensors given here must outlive the call."""
    channels, inner = layout(x, axis)
    return _C.Quantizer(
        x.numel(),
        x.data_ptr(),
        scale.data_ptr(),
        address(zero_point),
        channels,
        inner,
        qmin,
        qmax,
        noise,
        address(rng),
        address(cumulative),
        threshold,
        address(source),
        rounding,
        gradient,
    )


def forward(quantizers: list, tensors: list) -> tuple[list[torch.Tensor], list[float]]:
    """Quantize tensors of one dtype in one pass: results, and squared distances to the sources."""
    results = [empty_like(x) for x in tensors]
    addresses = [y.data_ptr() for y in results]
    squares = _C.quantizer_forward(threads(), FLOATS[tensors[0].dtype], quantizers, addresses)
    return results, squares


def backward(
    quantizers: list, grads: list, scales: list, grad_scales: list, pulls: list, grad_zs: Sequence = ()
) -> tuple[list, list]:
    """Gradients of tensors and of their scales, and into ``grad_zs`` those of their zero points, in one pass."""
    grad_xs = [empty_like(g) for g in grads]
    grad_ss = [torch.empty_like(s) for s in scales]
    addresses = ([t.data_ptr() for t in tensors] for tensors in (grads, grad_xs, grad_ss))
    zeros = [z.data_ptr() for z in grad_zs]
    _C.quantizer_backward(threads(), FLOATS[grads[0].dtype], quantizers, *addresses, zeros, grad_scales, pulls)
    return grad_xs, grad_ss


def address(x: torch.Tensor | None) -> int:
    """Where a tensor's elements are; 0 for none."""
    return 0 if x is None else x.data_ptr()
