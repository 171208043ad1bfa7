"""Curvature: the greatest eigenvalue and the trace of the loss's Hessian in the weights of a model.

What is differentiated is ``L(w)``, the mean over batches of the loss as a function of the weights of all layers
(:func:`hdrq.evaluate.weights.weights_of`), with biases and norms held. Of a quantized model, w is the dequantized
weights, taken as real numbers; with rounding in the way every derivative would be 0. A quantizer of activations rounds
for the same reason not at all: it clamps to its range (``activations="clamp"``), or is off (``"float"``). So ``L`` is a
continuous function with an exact Hessian almost everywhere; the straight-through gradient of rounded activations is
that of no function, and has none. Networks of ReLU are piecewise smooth: kinks add nothing to the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hdrq import checks
from hdrq.evaluate.weights import let_through, weights_of
from hdrq.prepare.copying import copy_model
from hdrq.quantizers.layers import input_readers
from hdrq.quantizers.modules import ActivationQuantizer

Loss = Callable[[nn.Module, Any], torch.Tensor]


class TopEigenvalue(NamedTuple):
    """What :func:`hessian_top_eigenvalue` returns: an eigenvalue lies within ``residual`` of ``value``."""

    value: float
    residual: float
    steps: int  # how many products with the Hessian it took


class Mean(NamedTuple):
    """A mean of random estimates."""

    value: float
    standard_error: float


class Trace(NamedTuple):
    """What :func:`hessian_trace` returns."""

    total: Mean
    layers: dict[str, Mean]  # of the block of each layer on the diagonal; they sum to the total


def hessian_top_eigenvalue(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    activations: str = "clamp",
    tolerance: float = 1e-3,
    steps: int = 64,
    seed: int = 0,
) -> TopEigenvalue:
    """The greatest eigenvalue of the Hessian of the loss in a model's weights, by Lanczos' method.

    Equation: from a random v_1, ``H·V = V·T + β·v_{m+1}·e_mᵀ`` with V orthonormal and T tridiagonal; the greatest
    eigenvalue θ of T, of the eigenvector s, is returned, and its residual ``β·abs(s_m) = ‖H·V·s − θ·V·s‖``. Every new
    vector is made orthogonal to all others twice, so no eigenvalue is found twice.

    Args:
        model: of float32 or float64; left as it is. It is measured in evaluation mode.
        loss: ``loss(model, batch)``: a tensor of one element, of which the mean over batches is taken, each alike.
        batches: anything that ``loss`` reads, on the model's device; gone through for every product with the Hessian.
        activations: what quantizers of activations are, ``"clamp"`` or ``"float"``; see the module.
        tolerance: it ends where the residual is at most this share of the eigenvalue,
        steps: or after as many products. As many vectors of the weights' size are held, float32.
        seed: of v_1, the same on every device.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Lanczos, J. Res. Nat. Bur. Standards 45 (1950); Parlett, The Symmetric Eigenvalue Problem (1980), ch. 13.
    """
    checks.integer("steps", steps, 1, 2**16)
    checks.real("tolerance", tolerance, 0.0)
    hessian = _Hessian(model, loss, batches, activations)
    v = hessian.like(torch.randn(hessian.size, generator=_seeded(seed)))
    basis = [v / v.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = hessian.times([basis[-1]])[0]
        diagonal.append(float(basis[-1].double() @ w.double()))
        for _ in range(2):
            for u in basis:
                w -= (u.double() @ w.double()).to(w.dtype) * u
        beta = float(w.double().norm())
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for k, b in enumerate(beside):
            matrix[k, k + 1] = matrix[k + 1, k] = b
        values, vectors = torch.linalg.eigh(matrix)
        value, residual = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        last = len(basis) in (steps, hessian.size) or beta <= 1e-6 * float(values.abs().max())
        if last or residual <= tolerance * abs(value):
            return TopEigenvalue(value, residual, len(basis))
        beside.append(beta)
        basis.append(w / beta)


def hessian_trace(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    activations: str = "clamp",
    probes: int = 16,
    seed: int = 0,
) -> Trace:
    """The trace of the Hessian of the loss in a model's weights, by Hutchinson's estimator.

    Equation: ``tr H ≈ mean of vᵀ·H·v`` over random v of ±1, with the standard error of that mean; the part of the sum
    that belongs to a layer estimates the trace of its block.

    Args:
        model, loss, batches, activations: as for :func:`hessian_top_eigenvalue`; batches are gone through once.
        probes: how many v, 2 at least. As many vectors of the weights' size are held.
        seed: of v, the same on every device.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Hutchinson, Communications in Statistics 18 (1989).
    """
    checks.integer("probes", probes, 2, 2**16)
    hessian = _Hessian(model, loss, batches, activations)
    signs = torch.randint(2, (probes, hessian.size), generator=_seeded(seed), dtype=torch.int8)
    vectors = [hessian.like(2 * each - 1) for each in signs]
    parts = torch.stack(
        [
            torch.stack([part.double().sum() for part in (v * h).split(hessian.sizes)])
            for v, h in zip(vectors, hessian.times(vectors), strict=True)
        ]
    )
    return Trace(_mean(parts.sum(1)), dict(zip(hessian.names, map(_mean, parts.T), strict=True)))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(checks.integer("seed", seed, 0, 2**63 - 1))


def _mean(values: torch.Tensor) -> Mean:
    return Mean(float(values.mean()), float(values.std() / len(values) ** 0.5))


class _Hessian:
    """Products of the Hessian with vectors: all weights, flat, one after another."""

    def __init__(self, model: nn.Module, loss: Loss, batches: Sequence[Any], activations: str) -> None:
        checks.choice("activations", activations, ("clamp", "float"))
        if iter(batches) is batches:
            raise TypeError(f"batches must be what can be gone through again, got the iterator {batches!r}")
        self.model, self.loss, self.batches = copy_model("model", model).eval().requires_grad_(False), loss, batches
        weights = weights_of(self.model)
        for weight in weights.values():
            if weight.quantizer is not None:
                weight.value.data = weight.quantizer.rounded(weight.value.detach())
        let_through(self.model)
        _smooth_inputs(self.model, activations)
        self.names, self.weights = [*weights], [weight.value.requires_grad_() for weight in weights.values()]
        kinds = {w.dtype for w in self.weights}
        if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
            got = ", ".join(sorted(map(checks.short, kinds)))
            raise TypeError(f"model must have weights of float32 or of float64 to be differentiated twice, got {got}")
        self.sizes = [w.numel() for w in self.weights]
        self.size = sum(self.sizes)

    def like(self, vector: torch.Tensor) -> torch.Tensor:
        """A vector with the dtype of the weights and where they are."""
        return vector.to(self.weights[0])

    def times(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``H·v`` of each v, the mean over batches."""
        products = [torch.zeros_like(v) for v in vectors]
        count = 0
        for count, batch in enumerate(self.batches, start=1):  # noqa: B007
            # The fused kernels of attention have no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                gradient = self._flat(self._loss(batch), create_graph=True)
            if gradient.requires_grad:  # else the loss is linear in the weights
                for product, v in zip(products, vectors, strict=True):
                    product += self._flat(gradient, v, retain_graph=True)
        if not count:
            raise ValueError("batches must be one or more, got none")
        return [product / count for product in products]

    def _loss(self, batch: Any) -> torch.Tensor:
        value = self.loss(self.model, batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            got = "one without" if isinstance(value, torch.Tensor) and value.numel() == 1 else got
            raise ValueError(f"loss must return a tensor of one element with a gradient, got {got}")
        checks.finite("loss", value.detach())
        return value.sum()

    def _flat(self, output: torch.Tensor, along: torch.Tensor | None = None, **options: bool) -> torch.Tensor:
        """The gradient of ``output``, times ``along``, in all weights; 0 in those that it does not depend on."""
        found = torch.autograd.grad(output, self.weights, along, materialize_grads=True, **options)
        return torch.cat([each.flatten() for each in found])


def _smooth_inputs(model: nn.Module, activations: str) -> None:
    """Put what does not round in the place of every quantizer of activations."""
    made: dict[int, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, quantizer in input_readers(model).items():
        new = nn.Identity() if activations == "float" else _Clamp(quantizer)
        modules[name].input_quantizer = made.setdefault(id(quantizer), new)


class _Clamp(nn.Module):
    """A quantizer that does not round: ``clamp(x, (qmin − z)·s, (qmax − z)·s)``."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.quantizer
        zero = 0 if own.zero_point is None else own.broadcast(own.zero_point, x)
        low, high = ((bound - zero) * own.broadcast(own.scale, x) for bound in (own.qmin, own.qmax))
        return torch.clamp(x, low.to(x.dtype), high.to(x.dtype))
