"""Rounding that makes up for its own errors: GPTQ's maths on one weight, which knows no model."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from hdrq import checks

DAMPING = 0.01  # of the reference
BLOCK, TOGETHER, PANEL = 8, 512, 128  # columns: of a leaf, of the recursion that it is of, of Cholesky


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

    What is computed is the same sum without an inverse, by Cholesky of H' from its last column: column j is rounded
    with ``Σ_{i<j} F_ji·(w_i − ŵ_i)`` added, ``F_ji = R_ij / R_jj`` for ``H' = RRᵀ``, R upper.
    It lowers ``tr((W − Ŵ)·H·(W − Ŵ)ᵀ)``, the squared error of the outputs over the inputs that H was made of; H = I is
    rounding to nearest. The grid is given and stays.

    Args:
        weight: (N, K), any floating-point type: K inputs.
        hessian: (K, K), XᵀX of the inputs X (samples, K); its factor does not matter.
        scale: float32 or float64, (1 or N, G): G scales along the inputs, each of K/G neighbours; one dimension: G = 1.
        qmin, qmax: the integer range.
        zero_point: integers, shaped as ``scale``; None for 0.
        damping: share of the mean of H's diagonal that is added to it.
        block: columns that are corrected one by one, before halves of a recursion are, at once; it decides the speed
            alone, but for round-off.
        act_order: take columns in the order of descending diag H; groups stay where they are.
        zero_dead: whether columns whose input is always 0 become 0, as in the reference, or are rounded to nearest.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Frantar et al., "GPTQ", ICLR 2023; that the sums are one: Chee et al., "QuIP", NeurIPS
    2023. Where H' has no Cholesky factor, all is rounded to nearest, and
    ``fell_back`` says so.
    """
    step, zero = _grid(weight, hessian, scale, zero_point)
    checks.quant_range(qmin, qmax)
    checks.real("damping", damping, 0.0)
    checks.integer("block", block, 1, 2**31)
    for name, value in (("weight", weight), ("hessian", hessian)):
        if not value.sum().isfinite():  # one pass where nothing is wrong
            checks.finite(name, value)
    columns, dead = weight.shape[1], hessian.diagonal() == 0
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    h = hessian.double() if order is None else hessian.double()[order][:, order]
    feedback = _feedback(h, dead if order is None else dead[order], damping)
    w = weight.T.contiguous().to(torch.float64, copy=True)  # a column is a row here
    if zero_dead:
        w[dead] = 0.0
    places = range(columns) if order is None else order.tolist()
    if order is not None and feedback is not None:
        w = w[order]
    sizes = [columns // len(grid) for grid in (step, zero)]
    codes = torch.empty(w.shape, dtype=checks.code_range(qmin, qmax), device=w.device)

    def rounded(j: int, value: torch.Tensor) -> None:
        """Round a column, and leave in its place what it misses."""
        at = places[j] if feedback is not None else j
        s, z = step[at // sizes[0]], zero[at // sizes[1]]
        q = (value / s).round_().add_(z).clamp_(qmin, qmax)
        codes[at] = q
        w[j].addcmul_(q.sub_(z), s, value=-1)

    def compensate(feedback: torch.Tensor, values: torch.Tensor, start: int, stop: int, first: int) -> None:
        """Round the columns from start to stop; row 0 of ``values`` is column ``first`` with all errors before it."""
        if stop - start > block:
            middle = (start + stop) // 2
            compensate(feedback, values, start, middle, first)
            values[middle - first : stop - first].addmm_(feedback[middle:stop, start:middle], w[start:middle])
            compensate(feedback, values, middle, stop, first)
            return
        for j in range(start, stop):
            value = values[j - first]
            rounded(j, value.addmv_(w[start:j].T, feedback[j, start:j]) if j > start else value)

    if feedback is None:
        for j in range(columns):
            rounded(j, w[j])
    else:
        for start in range(0, columns, TOGETHER):
            stop = min(start + TOGETHER, columns)
            compensate(
                feedback, torch.addmm(w[start:stop], feedback[start:stop, :start], w[:start]), start, stop, start
            )
    return Compensated(codes.T.contiguous(), int(dead.sum()), feedback is None)


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
        grids.append(grid.T.contiguous())
    if not (grids[0] > 0).all():
        raise ValueError(f"scale must be positive, got {float(grids[0].min())}")
    return grids[0], grids[1]


def _feedback(h: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor | None:
    """F, lower: column j is rounded with ``Σ_{i<j} F_ji·(w_i − ŵ_i)`` added. None where H' is not positive definite.

    ``H' = RRᵀ``, R upper, and ``F_ji = R_ij / R_jj``. GPTQ's ``H'⁻¹ = UᵀU`` has U = R⁻¹, so its updates add up to the
    same, and no inverse is needed. A power of two is taken out of H first: as a factor of H it moves no bit.
    """
    alive = h.diagonal()[~dead]
    mean = float(alive.mean()) if len(alive) else 1.0
    if not 0 < mean < math.inf:
        return None
    power = 2.0 ** -math.frexp(mean)[1]
    t = h * power
    diagonal = t.diagonal()
    diagonal[dead] = mean * power  # no other column hears of it
    diagonal += damping * (mean * power)
    squares = torch.empty_like(diagonal)  # R_jj²
    for start in range((len(t) - 1) // PANEL * PANEL, -1, -PANEL):  # F's last rows come first
        stop = min(start + PANEL, len(t))
        rows = t[start:stop, :stop]
        if stop < len(t):
            rows.addmm_((t[stop:, start:stop] * squares[stop:, None]).T, t[stop:, :stop], alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(rows[:, start:].flip(0, 1))
        if failed:
            return None
        upper = lower.flip(0, 1)
        own = upper.diagonal()[:, None]
        rows[:, :start] = torch.linalg.solve_triangular(upper, rows[:, :start], upper=True).div_(own)
        rows[:, start:] = upper.T / own
        squares[start:stop] = own[:, 0] ** 2
    return t if squares.isfinite().all() and squares.min() > 0 else None
