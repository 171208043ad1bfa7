"""Rounding that makes up for its own errors: GPTQ's maths on one weight, which knows no model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hdrq import checks

DAMPING, BLOCK = 0.01, 128  # of the reference


class Compensated(NamedTuple):
    """What :func:`gptq` returns."""

    codes: torch.Tensor  # (N, K), int8 or int16
    dead: int  # columns whose input is always 0: nothing says how they should be rounded
    fell_back: bool  # whether H had no Cholesky factor, damped, so that every column was rounded to nearest


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    zero_point: torch.Tensor | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
    act_order: bool = False,
    zero_dead: bool = True,
) -> Compensated:
    """Round a weight column by column, so that columns to come make up for the errors of those that are rounded.

    Equation, in float64, for columns j in order, ``H' = H + damping·mean(diag H)·I`` and ``H'⁻¹ = UᵀU``, U upper::

        q_j = clamp(round_half_even(w_j / s_j) + z_j, qmin, qmax),  e = (w_j − (q_j − z_j)·s_j) / U_jj
        w_k ← w_k − e·U_jk  for k > j

    It lowers ``tr((W − Ŵ)·H·(W − Ŵ)ᵀ)``, the squared error of the outputs over the inputs that H was made of; H = I
    is rounding to nearest. The grid is given and stays.

    Args:
        weight: (N, K), any floating-point type: K inputs.
        hessian: (K, K), XᵀX of the inputs X (samples, K); its factor does not matter.
        scale: float32 or float64, (1 or N, G): G scales along the inputs, each of K/G neighbours; one dimension: G = 1.
        qmin, qmax: the integer range.
        zero_point: integers, shaped as ``scale``; None for 0.
        damping: share of the mean of H's diagonal that is added to it.
        block: columns that are corrected at once; it decides the speed alone, but for round-off.
        act_order: take columns in the order of descending diag H; groups stay where they are.
        zero_dead: whether columns whose input is always 0 become 0, as in the reference, or are rounded to nearest.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Frantar et al., "GPTQ", ICLR 2023. Where H' has no Cholesky factor, all is rounded to nearest, and
    ``fell_back`` says so.
    """
    step, zero = _grid(weight, hessian, scale, zero_point)
    checks.quant_range(qmin, qmax)
    checks.real("damping", damping, 0.0)
    checks.integer("block", block, 1, 2**31)
    w, h = weight.double(), checks.finite("hessian", hessian.double())
    checks.finite("weight", w)
    columns = w.shape[1]
    dead = h.diagonal() == 0
    if zero_dead:
        w = w.masked_fill(dead, 0.0)
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns, device=w.device)
    factor = _factor(h[order][:, order], dead[order], damping)

    def rounded(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return ((values / step[:, places]).round() + zero[:, places]).clamp(qmin, qmax)

    codes = torch.empty_like(w, dtype=checks.code_range(qmin, qmax))
    if factor is None:
        codes.copy_(rounded(w, slice(None)))  # type: ignore[arg-type]
        return Compensated(codes, int(dead.sum()), True)
    w = w[:, order]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = w.new_empty(len(w), stop - start)
        for j in range(start, stop):
            place = order[j : j + 1]
            q = rounded(w[:, j : j + 1], place)
            error = (w[:, j : j + 1] - (q - zero[:, place]) * step[:, place]) / factor[j, j]
            w[:, j + 1 : stop] -= error * factor[j, j + 1 : stop]
            errors[:, j - start], codes[:, order[j]] = error[:, 0], q[:, 0].to(codes.dtype)
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return Compensated(codes, int(dead.sum()), False)


def _grid(weight, hessian, scale, zero_point) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of every element, float64, once the arguments are found to fit each other."""
    for name, value in (("weight", weight), ("hessian", hessian), ("scale", scale)):
        checks.tensor(name, value, (*checks.FLOATS, torch.float64))
    if weight.ndim != 2:
        raise ValueError(f"weight must have two axes, outputs and inputs, got the shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ValueError(
            f"hessian must have the shape {(columns, columns)}, given this weight, got {tuple(hessian.shape)}"
        )
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    grids = []
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        grid = value.double().reshape(-1, 1) if value.ndim < 2 else value.double()
        if grid.ndim != 2 or grid.shape[0] not in (1, rows) or not grid.shape[1] or columns % grid.shape[1]:
            raise ValueError(
                f"{name} must be (1 or {rows}, G), G dividing {columns}, given this weight, got {tuple(value.shape)}"
            )
        checks.finite(name, grid)
        grids.append(grid.repeat_interleave(columns // grid.shape[1], 1) if grid.shape[1] > 1 else grid)
    if not (grids[0] > 0).all():
        raise ValueError(f"scale must be positive, got {float(grids[0].min())}")
    return grids[0].expand(rows, columns), grids[1].expand(rows, columns)


def _factor(h: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor | None:
    """U with ``H'⁻¹ = UᵀU``, upper; None where H' is not positive definite."""
    h = h.clone()
    diagonal = h.diagonal()
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not upper.isfinite().all() else upper
