"""The loop that learns one unit: its batches, its steps, and what happens where a loss is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks, ops
from hdrq.calibrate.cache import batches
from hdrq.calibrate.progress import LOG_EVERY
from hdrq.calibrate.sequential import Unit
from hdrq.errors import DivergenceError
from hdrq.methods.loss import unit_loss
from hdrq.methods.reconstruct.graph import Graph
from hdrq.methods.reconstruct.memory import kept_memory
from hdrq.methods.reconstruct.parameters import Parameters
from hdrq.methods.reconstruct.schedule import ROUNDING_WEIGHT, schedule
from hdrq.prepare.observe import observe
from hdrq.quantizers.modules import Quantizer, substituted
from hdrq.recipes import Recipe
from hdrq.rng import rng_state


class Learner:
    """A unit while it is learned.

    Args:
        source: the source's weights for the unit's layers; empty where no distance is asked for.
        seed: of the batches and of the random streams, together with the unit's number.
        graph: ``"auto"`` (a CUDA graph on a GPU), True or False.
    """

    def __init__(
        self, unit: Unit, recipe: Recipe, source: dict[str, torch.Tensor], seed: int, graph: bool | str = "auto"
    ) -> None:
        self.unit, self.recipe, self.source, self.graph = unit, recipe, source, graph
        self.device = unit.target.device
        generator = torch.Generator().manual_seed(seed + unit.index)
        size = min(recipe.batch_size, unit.count)
        self.indices = torch.randint(unit.count, (recipe.iterations, size), generator=generator)
        self._give_streams(seed)
        self.schedule = schedule(recipe).to(self.device)
        self.row = self.schedule.new_zeros(self.schedule.shape[1])  # of the schedule, for this iteration
        self.parameters = Parameters(unit, recipe, self.row)
        self.quantizers = [layer.weight_quantizer for layer in unit.layers]
        self.untouched: list[str] = []  # layers that the last reconstruction loss did not reach

    def _give_streams(self, seed: int) -> None:
        """Give every quantizer of the unit a random stream of its own, and one to the mix of the inputs."""
        quantizers: list[Quantizer] = [layer.weight_quantizer for layer in self.unit.layers]
        quantizers += self.unit.activations.values()
        first = self.unit.index << 16
        streams = range(first, first + len(quantizers) + 1)
        self.rngs = torch.stack([rng_state(seed, stream) for stream in streams]).to(self.device)
        for quantizer, rng in zip(quantizers, self.rngs, strict=False):
            quantizer.rng = rng
        self.mix = self.rngs[-1]

    # --- the loop

    @kept_memory()
    def learn(self, start: int, log: Callable[[int, float], None], save: Callable[[int], None], every: int) -> None:
        """All iterations from ``start`` on. ``log`` is told the loss from time to time, ``save`` when to save.

        Raises:
            DivergenceError: a loss is not finite.
        """
        good, state, phase, run = start, self.parameters.state(copy=True), "", self.step
        iterations = self.recipe.iterations
        for i, batch in enumerate(self._batches(start), start):
            if self._phase(i) != phase:
                phase = self._phase(i)
                self._set_modes(phase)
                run = self._graphed()
            self.row.copy_(self.schedule[i])
            error, loss = run(batch)
            done = i + 1
            if i == start:
                self._refuse_unreached()
            due = every > 0 and done % every == 0 and done < iterations
            if due or done % LOG_EVERY == 0 or done == iterations:
                if not self._finite(loss):
                    self.load(state, good)
                    raise self._divergence(good, done)
                good, state = done, self.parameters.state(copy=True)
                log(done, float(error))
            if due:
                save(done)

    def step(self, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward, optimizer, the next noise; nothing is read on the host.

        The reconstruction loss is differentiated as far as the quantized weights, and what they are made of after
        that: a block that computes parts anew during its backward pass finds the weights of its forward pass.
        """
        self.parameters.optimizer.zero_grad()
        weights, regularizer = self._quantize_weights()
        leaves = [weight.detach().requires_grad_() for weight in weights]
        with substituted(self.quantizers, leaves), parametrize.cached():
            error = self._reconstruction_loss(batch)
            if error.requires_grad:
                error.backward()
        reached = [(weight, leaf.grad) for weight, leaf in zip(weights, leaves, strict=True) if leaf.grad is not None]
        self.untouched = [layer.name for layer, leaf in zip(self.unit.layers, leaves, strict=True) if leaf.grad is None]
        loss = error.detach()
        roots, grads = [weight for weight, _ in reached], [grad for _, grad in reached]
        if isinstance(regularizer, torch.Tensor) and regularizer.requires_grad:
            loss = loss + regularizer.detach()
            roots, grads = [*roots, regularizer], [*grads, torch.ones_like(regularizer)]
        if roots:
            torch.autograd.backward(roots, grads)
        self.parameters.step()
        with torch.no_grad():
            self.rngs[:, 2] += 1
        return error.detach(), loss

    @torch.no_grad()
    def distance_term(self) -> float:
        """``λ Σ ‖w − w_src‖₂`` of the weights as they are."""
        norms = [
            torch.linalg.vector_norm(layer.latent - self.source[layer.name])
            for layer in self.unit.layers
            if self.source
        ]
        return self.recipe.distance * float(sum(norms))

    def _reconstruction_loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        *inputs, target = batch
        count = len(self.unit.quantized)
        mixed = [self._mixed(*pair) for pair in zip(inputs, inputs[count:] or inputs, strict=False)]
        return unit_loss(self.unit, mixed, target)

    def _quantize_weights(self) -> tuple[list[torch.Tensor], torch.Tensor | float]:
        """The quantized weights of this step, layer by layer, and what is added to the reconstruction loss.

        That is ``λ Σ ‖w − w_src‖₂``, or the weighted penalties of AdaRound.
        """
        if self.recipe.learns == "rounding":
            pairs = [layer.weight_quantizer.adaround(layer.latent) for layer in self.unit.layers]
            return [y for y, _ in pairs], self.row[ROUNDING_WEIGHT] * sum(penalty for _, penalty in pairs)
        quantized: dict[str, torch.Tensor] = {}
        total: torch.Tensor | float = 0.0
        for axis in dict.fromkeys(quantizer.axis for quantizer in self.quantizers):
            layers = [layer for layer in self.unit.layers if layer.weight_quantizer.axis == axis]
            quantizers = [layer.weight_quantizer for layer in layers]
            weights, distances = ops.quantize_weights(
                [layer.latent for layer in layers],
                [q.scale for q in quantizers],
                [(q.qmin, q.qmax) for q in quantizers],
                sources=[self.source[layer.name] for layer in layers] if self.source else None,
                rngs=[q.rng for q in quantizers] if quantizers[0].mode == "noise" else None,
                noise=self.recipe.noise,
                axis=axis,
            )
            quantized.update(zip((layer.name for layer in layers), weights, strict=True))
            total = total if distances is None else total + distances.sum()
        return [quantized[layer.name] for layer in self.unit.layers], self.recipe.distance * total

    def _mixed(self, quantized: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """Of the quantized prefix with probability ``input_keep``, element by element, else of full precision."""
        if quantized is full or not quantized.is_floating_point():
            return quantized
        return ops.drop_mix(quantized, full, self.recipe.input_keep, self.mix)

    def _batches(self, start: int) -> Iterator[list[torch.Tensor]]:
        mixes = self.recipe.input_keep < 1 and self.unit.full is not self.unit.quantized
        sources = [*self.unit.quantized, *(self.unit.full if mixes else []), self.unit.target]
        return batches(sources, self.indices[start:])

    def _graphed(self) -> Callable:
        if self.graph is False or self.device.type != "cuda":
            return self.step
        return Graph(self.step, self.graph is True, self.device)

    def _phase(self, iteration: int) -> str:
        if self.recipe.learns == "rounding":
            return "adaround"
        last = round(self.recipe.fake_quant_fraction * self.recipe.iterations)
        return "noise" if iteration < self.recipe.iterations - last else "round"

    def _set_modes(self, phase: str) -> None:
        for layer in self.unit.layers:
            layer.weight_quantizer.mode = phase
        for activation in self.unit.activations.values():
            activation.mode = "noise" if phase == "noise" and self.recipe.noise_activations else "round"
            activation.noise, activation.keep = self.recipe.noise, self.recipe.activation_keep

    def load(self, tensors: dict[str, torch.Tensor], iteration: int) -> None:
        """Go back to a state that was taken when ``iteration`` steps were done."""
        self.parameters.load(tensors)
        self.rngs[:, 2] = iteration

    def _step_of(self, batch: list[torch.Tensor], module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`step`, as a run of the unit's module that can be observed."""
        return self.step(batch)

    def _refuse_unreached(self) -> None:
        """A unit of which no weight has a gradient cannot be learned; what the distance alone moves is not meant."""
        if self.unit.layers and len(self.untouched) == len(self.unit.layers):
            raise ValueError(
                f"block {self.unit.name or 'model'} must pass a gradient from its output to its weights, got none for "
                f"{checks.listed(self.untouched)}: its forward runs under torch.no_grad or inference_mode, or "
                'checkpoints with use_reentrant=True; take that out, or keep its layers in full precision with "float"'
            )

    # --- divergence

    def _finite(self, loss: torch.Tensor) -> bool:
        return bool(loss.isfinite() & self.parameters.all_finite().all())

    def _divergence(self, good: int, done: int) -> DivergenceError:
        """Run again from the last good state, looking at every iteration; then go back to it."""
        state = self.parameters.state(copy=True)
        broken_layers: list[str] = []

        def note(name, module, args, kwargs, output) -> None:
            if not module.weight.isfinite().all() or not output.isfinite().all():
                broken_layers.append(names[name])

        start = len(self.unit.name) + 1 if self.unit.name else 0
        names = {layer.name[start:]: layer.name for layer in self.unit.layers}
        for i, batch in zip(range(good, done), self._batches(good), strict=False):
            self._set_modes(self._phase(i))
            self.row.copy_(self.schedule[i])
            broken_layers.clear()
            _, loss = observe(self.unit.module, partial(self._step_of, batch), after=note, names=names)
            if not self._finite(loss):
                break
        broken = [name for name, p in self.parameters.by_name.items() if not p.isfinite().all()]
        self.load(state, good)
        layer = (broken_layers or [name.rpartition(".")[0] for name in broken] or ["none: the loss itself"])[0]
        return DivergenceError(self.unit.name, layer, i + 1, float(loss), good)
