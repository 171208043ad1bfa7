"""Least squares with a target of each task and an anchor: the maths on one weight, which knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hdrq import checks

SINGULAR = 8.0  # roundings of float64, for each input, below which a pivot or an eigenvalue counts as 0


class Solved(NamedTuple):
    """What :func:`anchored` returns, in float64."""

    weight: torch.Tensor  # (N, K): W*
    hessian: torch.Tensor  # (K, K): H
    unexcited: int  # directions of the inputs that H is 0 in, where W_m is kept
    merged_error: float  # J(W_m)
    error: float  # J(W*)


@torch.no_grad()
def anchored(
    merged: torch.Tensor,
    targets: Sequence[torch.Tensor],
    hessians: Sequence[torch.Tensor],
    shares: Sequence[float],
    lam: float = 0.0,
) -> Solved:
    """The weight whose outputs are nearest to those of all targets, each on its inputs, and which stays near an anchor.

    Equation, in float64, with ``H_t = X_tᵀX_t`` of the inputs X_t (samples, K) of task t::

        J(W) = Σ_t a_t·‖(W − W_t)·X_tᵀ‖² + λ·‖W − W_m‖²,    λ = lam·mean diag(Σ a_t·H_t)
        H = Σ a_t·H_t + λ·I,    W* = W_m + (Σ a_t·(W_t − W_m)·H_t)·H⁻¹

    and ``J(W) = J(W*) + tr((W − W*)·H·(W − W*)ᵀ)`` for every W: what is left to do is to round W* for H. Equal weights
    give W_m to the bit. Where H is singular, as with lam = 0 and inputs that no sample excites, H⁻¹ is the
    pseudo-inverse: W_m is kept in the directions that nothing speaks of, and they are counted.

    Args:
        merged: (N, K), the anchor W_m.
        targets: the weights W_t of K inputs.
        hessians: (K, K), one for each target.
        shares: a_t, over 0.
        lam: λ, relative; 0 for no anchor.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: the normal equations; lam = 0 is RegMean (Jin et al., "Dataless Knowledge Fusion", ICLR 2023).
    """
    checks.real("lam", lam, 0.0)
    w = checks.finite("merged", merged.double())
    h = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64, device=w.device)
    pull, merged_error = torch.zeros_like(w), 0.0
    for k, (target, hessian, share) in enumerate(zip(targets, hessians, shares, strict=True)):
        if target.shape != w.shape or hessian.shape != h.shape:
            got = f"{tuple(target.shape)} and {tuple(hessian.shape)}"
            raise ValueError(
                f"targets and hessians must have the shapes {tuple(w.shape)} and {tuple(h.shape)}, got {got}"
            )
        if not hessian.sum().isfinite():
            checks.finite(f"hessians[{k}]", hessian)
        h.add_(hessian, alpha=share)
        difference = checks.finite(f"targets[{k}]", target.double()) - w
        if difference.any():
            product = (difference @ hessian.double()).mul_(share)
            merged_error += float((product * difference).sum())
            pull += product
    h.diagonal().add_(lam * h.diagonal().mean())
    correction, unexcited = _solved(h, pull)
    return Solved(w + correction, h, unexcited, merged_error, merged_error - energy(correction, h))


def energy(change: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(C·H·Cᵀ)``: what a change C of a weight adds to J(W*)."""
    return float((change.double() @ hessian * change).sum())


def _solved(h: torch.Tensor, pull: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``pull·H⁻¹``, with the pseudo-inverse where H is singular, and how many directions H is 0 in.

    Where there is nothing to solve, only inputs that are always 0 are counted.
    """
    if not pull.any():
        return pull, int((h.diagonal() == 0).sum())
    least = SINGULAR * len(h) * torch.finfo(torch.float64).eps
    lower, failed = torch.linalg.cholesky_ex(h)
    pivots = lower.diagonal().square()
    if not failed and pivots.min() > least * pivots.max():
        return torch.cholesky_solve(pull.T, lower).T, 0
    values, vectors = torch.linalg.eigh(h)
    alive = values > least * values.max()
    vectors = vectors[:, alive]
    solution = (pull @ vectors / values[alive]) @ vectors.T
    return solution.masked_fill_(h.diagonal() == 0, 0.0), int((~alive).sum())
