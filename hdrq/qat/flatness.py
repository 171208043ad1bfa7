"""Sharpness-aware steps of any optimizer, on models with quantizers: SAM, ASAM and SAGM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hdrq import checks
from hdrq.prepare.observe import hooks
from hdrq.qat.lsq import quantizers
from hdrq.quantizers.layers import quantized_layers

if TYPE_CHECKING:
    from hdrq.qat.freezing import DisorderFreezer

PERTURBED = ("latent", "quantized")
SMALL = 1e-12  # added to the norm, as SAM's code does


class SAM:
    """Sharpness-aware minimization: the optimizer's step from θ, with the gradient at ``θ + ε``.

    With L the loss, one norm over all parameters that have a gradient, and both gradients of one batch::

        g = ∇L(θ),   ε = rho·g/(‖g‖₂ + 1e-12),   θ ← optimizer(θ, ∇L(θ + ε))

    :meth:`step` runs the closure twice. Both passes draw the same random numbers from torch's generators, so dropout
    has one mask; buffers, BatchNorm's statistics among them, are what the first pass leaves; θ is restored by copy, to
    the bit, also where the second pass fails. Gradients are zeroed before each pass: a closure that runs several parts
    of a batch accumulates them. Learning rates are scheduled on ``optimizer``, the one that is wrapped.

    Args:
        optimizer: any of torch's that steps without a closure of its own; its parameters are on one device.
        model: what the closure runs.
        rho: ‖ε‖₂.
        perturb: what of a quantized weight is moved: the ``"latent"`` one before rounding, which may take the movement
            away, or the ``"quantized"`` one after it; then g is the gradient with respect to that.
        perturb_scales: whether ε has the scales of quantizers too; without, they take no part in the norm.
        freezer: drops terms of the gradients of single layers; none drops nothing.
        scaler: of gradients under float16 autocast. The closure calls ``scaler.scale(loss).backward()``; this class
            steps and updates the scaler, and leaves the second pass out where the first has infinite gradients.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Foret et al., "Sharpness-Aware Minimization", ICLR 2021 (arXiv 2010.01412). ``perturb="quantized"`` is of
    Liu et al., "Sharpness-aware Quantization" (arXiv 2111.12273).

    Example::

        >>> import torch
        >>> from hdrq.qat import SAM
        >>> model, x = torch.nn.Linear(4, 2), torch.randn(8, 4)
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), model, rho=0.05)
        >>> def closure():
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    averages = False  # whether the update is the mean of both gradients, else the second alone

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        rho: float = 0.05,
        perturb: str = "latent",
        perturb_scales: bool = False,
        freezer: DisorderFreezer | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if isinstance(optimizer, SAM):
            raise TypeError(
                f"optimizer must be one of torch's, got {type(optimizer).__name__}, which is wrapped already; give "
                "its .optimizer"
            )
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"optimizer must be one of torch's that steps without a closure, got {type(optimizer).__name__}"
            )
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be the torch.nn.Module that the closure runs, got {type(model).__name__}")
        self.optimizer, self.model, self.scaler, self.freezer = optimizer, model, scaler, freezer
        self.rho = checks.real("rho", rho, 0.0)
        self.perturb = checks.choice("perturb", perturb, PERTURBED)
        self.perturb_scales = checks.choice("perturb_scales", perturb_scales, (False, True))
        devices = {p.device for p in self._parameters()}
        if len(devices) > 1:
            raise ValueError(f"optimizer must have its parameters on one device, got {sorted(map(str, devices))}")
        self.device = devices.pop()
        if perturb == "quantized" and not quantized_layers(model):
            raise ValueError('model must have quantizers for perturb="quantized", got none: hdrq.qat.prepare')
        self._scales = {id(quantizer.scale) for quantizer in quantizers(model).values()}
        if freezer is not None:
            freezer.check(self._parameters(), self.averages)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer that is wrapped."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of the optimizer that is wrapped; :meth:`step` does it by itself."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer that is wrapped; nothing else lasts from one step to the next."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """One step of the optimizer.

        Args:
            closure: computes the loss of the step's batch, calls ``backward`` on it, and returns it.

        Returns:
            The loss at θ.

        Raises:
            TypeError: no closure: the gradient is needed at two points.
            ValueError: the closure leaves no gradient.
        """
        if not callable(closure):
            got = type(closure).__name__
            raise TypeError(
                f"closure must be a function that computes the loss and calls backward, for it runs twice, got {got}"
            )
        draws = self._draws()
        with self._reading() as read:
            loss = self._run(closure)
        parameters = self._parameters()
        first = [p.grad for p in parameters]
        if all(g is None for g in first):
            raise ValueError("closure must call backward on a loss of the optimizer's parameters, got no gradient")
        moved, values, gradients = self._points(parameters, read)
        norm = self._norm(values, gradients)
        if self.scaler is not None and not bool(norm.isfinite()):
            self._finish()
            return loss
        with self._moved(moved, self._epsilon(values, gradients, norm)):
            self._draw_again(draws)
            self._run(closure)
        second = [p.grad for p in parameters]
        terms = {id(p): (a, b) for p, a, b in zip(parameters, first, second, strict=True)}
        self._combine(parameters, first, second)
        if self.freezer is not None:
            self.freezer.step(lambda p: self._terms(*terms[id(p)]))
        self._finish()
        return loss

    def _norm(self, values: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.device)

    def _epsilon(self, values, gradients, norm: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch._foreach_mul(gradients, self.rho / (norm + SMALL)) if gradients else []

    def _combine(self, parameters, first, second) -> None:
        """Leave in the parameters what the optimizer steps with."""

    def _terms(self, first: torch.Tensor | None, second: torch.Tensor | None) -> tuple:
        """The terms of the update: of the task, and of flatness. They sum up to it."""
        if first is None or second is None:
            return first, second
        return first, second - first

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _run(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # it has casts of the parameters where they were
        with torch.enable_grad():
            loss = closure()
        return loss.detach() if isinstance(loss, torch.Tensor) else loss

    def _points(self, parameters: list[nn.Parameter], read: dict[int, _Read]) -> tuple[list, list, list]:
        """What is moved, parameters and quantizers; where each is; and the gradient there."""
        moved: list[Any] = []
        values: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for p in parameters:
            if p.grad is None or (id(p) in self._scales and not self.perturb_scales):
                continue
            found = read.get(id(p))
            if found is None:
                moved.append(p)
                values.append(p)
                gradients.append(p.grad)
            elif found.gradient is not None:
                moved.append(found.quantizer)
                values.append(found.value)
                gradients.append(found.gradient)
        return moved, values, gradients

    @contextmanager
    def _reading(self) -> Iterator[dict[int, _Read]]:
        """Inside the block, quantized weights and their gradients are noted, by the identity of the latent weight."""
        read: dict[int, _Read] = {}
        if self.perturb == "latent":
            yield read
            return
        handles = []
        for layer in quantized_layers(self.model).values():
            if layer.latent.requires_grad and id(layer.latent) not in read:
                entry = read[id(layer.latent)] = _Read(layer.weight_quantizer)
                handles.append(layer.weight_quantizer.register_forward_hook(entry.note))
        with hooks(handles):
            yield read

    @contextmanager
    def _moved(self, moved: list, epsilon: Sequence[torch.Tensor]) -> Iterator[None]:
        """Inside the block, everything is moved; then it is back, and so are all buffers."""
        shifts = [(what, e) for what, e in zip(moved, epsilon, strict=True) if not isinstance(what, nn.Parameter)]
        plain = [(what, e) for what, e in zip(moved, epsilon, strict=True) if isinstance(what, nn.Parameter)]
        parameters: list[torch.Tensor] = [p for p, _ in plain]
        kept = [p.clone() for p in parameters]
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        handles = [quantizer.register_forward_hook(_shift(e)) for quantizer, e in shifts]
        try:
            if parameters:
                torch._foreach_add_(parameters, [e for _, e in plain])
            with hooks(handles):
                yield
        finally:
            for now, old in zip([*parameters, *buffers], [*kept, *before], strict=True):
                now.copy_(old)

    def _draws(self) -> list[torch.Tensor]:
        """The state of torch's generators; nothing while a CUDA graph is captured, which cannot go back."""
        if self.device.type != "cuda":
            return [torch.get_rng_state()]
        if torch.cuda.is_current_stream_capturing():
            return []
        return [torch.get_rng_state(), torch.cuda.get_rng_state(self.device)]

    def _draw_again(self, draws: list[torch.Tensor]) -> None:
        if draws:
            torch.set_rng_state(draws[0])
        if len(draws) > 1:
            torch.cuda.set_rng_state(draws[1], self.device)

    def _finish(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


class ASAM(SAM):
    """SAM with a neighbourhood that scales with the weights: ``ε = rho·θ²·g/(‖|θ|·g‖₂ + 1e-12)``, elementwise.

    Arguments are those of :class:`SAM`; ``rho`` is about ten times larger, and bounds ``‖ε/θ‖₂``.

    Source: Kwon et al., "ASAM", ICML 2021 (arXiv 2102.11600).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, rho: float = 0.5, **options: Any) -> None:
        super().__init__(optimizer, model, rho=rho, **options)

    def _norm(self, values, gradients) -> torch.Tensor:
        sizes = [value.abs() for value in values]
        return super()._norm(values, list(torch._foreach_mul(gradients, sizes)) if gradients else [])

    def _epsilon(self, values, gradients, norm) -> Sequence[torch.Tensor]:
        squares: Any = torch._foreach_mul(values, values) if gradients else []
        return super()._epsilon(values, torch._foreach_mul(gradients, squares) if gradients else [], norm)


class SAGM(SAM):
    """Sharpness-aware gradient matching: the mean of the gradients at θ and at ``θ + ε``.

    ::

        ε = (rho/(‖g‖₂ + 1e-12) − alpha)·g,   θ ← optimizer(θ, (∇L(θ) + ∇L(θ + ε))/2)

    Arguments are those of :class:`SAM`, and ``alpha``. The released code subtracts ε again; here θ is copied back.

    Source: Wang et al., "Sharpness-Aware Gradient Matching for Domain Generalization", CVPR 2023 (arXiv 2303.10353).
    """

    averages = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        rho: float = 0.05,
        alpha: float = 0.001,
        **options: Any,
    ) -> None:
        self.alpha = checks.real("alpha", alpha, 0.0)
        super().__init__(optimizer, model, rho=rho, **options)

    def _epsilon(self, values, gradients, norm) -> Sequence[torch.Tensor]:
        alpha = self.alpha if self.scaler is None else self.alpha / self.scaler.get_scale()
        return torch._foreach_mul(gradients, self.rho / (norm + SMALL) - alpha) if gradients else []

    def _combine(self, parameters, first, second) -> None:
        both = [(p, a, b) for p, a, b in zip(parameters, first, second, strict=True) if not (a is None or b is None)]
        mean = torch._foreach_add([a for _, a, _ in both], [b for _, _, b in both])
        torch._foreach_mul_(mean, 0.5)
        for (p, _, _), g in zip(both, mean, strict=True):
            p.grad = g
        for p, a, b in zip(parameters, first, second, strict=True):
            if (a is None) != (b is None):
                p.grad = 0.5 * (b if a is None else a)

    def _terms(self, first, second) -> tuple:
        return None if first is None else 0.5 * first, None if second is None else 0.5 * second


class _Read:
    """A quantized weight as a pass had it, and the sum of its gradients."""

    def __init__(self, quantizer: nn.Module) -> None:
        self.quantizer = quantizer
        self.value: Any = None
        self.gradient: torch.Tensor | None = None

    def note(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            self.value = output.detach()
            output.register_hook(self._add)

    def _add(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach()
        self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient


def _shift(epsilon: torch.Tensor) -> Callable:
    return lambda module, args, output: output + epsilon
