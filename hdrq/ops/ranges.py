"""Family ``ranges``: where a quantizer's scale starts."""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends import implementation
from hdrq.ops._library import not_differentiable, register


def search_scale(
    x: torch.Tensor, qmin: int, qmax: int, *, norm: float = 2.4, candidates: int = 100, axis: int | None = None
) -> torch.Tensor:
    """The scale whose quantization error is least in the L_p sense, over evenly spaced clip thresholds.

    Equation: of ``s_i = (i/candidates)·max|x|/h``, i = 1 … candidates, the first with the least
    ``Σ |fake_quantize(x, s_i) − x|^norm``; ``h = (qmax − qmin)/2`` where qmin < 0, else qmax (and then the maximum is
    that of x itself).

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        qmin, qmax: the integer range.
        norm: the exponent p, over 0.
        candidates: how many thresholds, at least 1.
        axis: the axis along which a scale of its own is sought for each element; None for one scale.

    Returns:
        float32, one element or ``x.shape[axis]`` elements, positive and finite: 1 where x is all zero or empty.

    Raises:
        TypeError, ValueError: "X must be …, got …"; x not finite (on a CPU).

    Source: BRECQ (Li et al., ICLR 2021) and the released code of HDRQ, which take p = 2.4 over 100 thresholds.
    """
    _check(x, qmin, qmax, norm, candidates, axis)
    return _search_op(x.detach(), qmin, qmax, norm, candidates, axis)


def _check(x, qmin, qmax, norm, candidates, axis) -> int | None:
    checks.tensor("x", x, checks.FLOATS)
    checks.quant_range(qmin, qmax)
    checks.integer("candidates", candidates, 1, 2**16)
    if checks.real("norm", norm) <= 0:
        raise ValueError(f"norm must be over 0, got {norm}")
    return checks.axis_of(x, axis)


def _search(x, qmin, qmax, norm=2.4, candidates=100, axis=None) -> torch.Tensor:
    axis = _check(x, qmin, qmax, norm, candidates, axis)
    if x.device.type == "cpu" and not x.isfinite().all():
        raise ValueError(
            f"x must be finite to search its scale, got {int((~x.isfinite()).sum())} elements that are not"
        )
    return implementation("ranges", "search_scale", x)(x.contiguous(), qmin, qmax, norm, candidates, axis)


def _search_fake(x, qmin, qmax, norm=2.4, candidates=100, axis=None) -> torch.Tensor:
    axis = _check(x, qmin, qmax, norm, candidates, axis)
    return x.new_empty(1 if axis is None else x.shape[axis], dtype=torch.float32)


_search_op = register(
    "search_scale(Tensor x, int qmin, int qmax, float norm=2.4, int candidates=100, int? axis=None) -> Tensor",
    _search,
    _search_fake,
    no_vmap="name the batch's axis with axis",
)
not_differentiable(_search_op, "it is the place where learning a scale starts")
