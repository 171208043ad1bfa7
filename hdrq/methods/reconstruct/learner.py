"""The loop that learns one unit: its batches, its steps, and what happens where a loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.calibrate.cache import batches
from hdrq.calibrate.progress import LOG_EVERY
from hdrq.calibrate.sequential import Unit
from hdrq.errors import DivergenceError
from hdrq.methods.loss import AT_ONCE, UnitLoss, channel_axis
from hdrq.methods.reconstruct import samples
from hdrq.methods.reconstruct.graph import Graph
from hdrq.methods.reconstruct.memory import kept_memory
from hdrq.methods.reconstruct.parameters import Parameters
from hdrq.methods.reconstruct.schedule import ROUNDING_WEIGHT, schedule
from hdrq.prepare.observe import observe
from hdrq.quantizers.modules import Quantizer, substituted
from hdrq.recipes import Recipe
from hdrq.rng import rng_state

FAULTS_OF_MACHINES = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class Best(NamedTuple):
    """The state of a unit that was the best when judged."""

    objective: float  # the loss with ``λ Σ ‖W − W_src‖₂``
    loss: float
    iteration: int  # 0 for the unit as it was rounded to nearest
    tensors: dict[str, torch.Tensor]


class Learner:
    """A unit while it is learned, by all ranks that share its samples.

    Each rank runs its part of a batch. Gradients of quantized weights, of activations' scales and of biases are
    averaged before anything else is made of them, so every rank takes the same step. Noise of weights is the same on
    all ranks; drops and noise of activations are of other streams on each.

    Args:
        source: the source's weights for the unit's layers; empty where no distance is asked for.
        seed: of the batches and of the random streams, together with the unit's number.
        graph: ``"auto"`` (a CUDA graph on a GPU), True or False.
    """

    def __init__(
        self, unit: Unit, recipe: Recipe, source: dict[str, torch.Tensor], seed: int, graph: bool | str = "auto"
    ) -> None:
        self.unit, self.recipe, self.source, self.graph = unit, recipe, source, graph
        self.device, self.ranks = unit.target.device, unit.ranks
        self.weights = unit.weights
        self.quantizers = [layer.weight_quantizer for layer in self.weights]
        self.loss = UnitLoss(unit, channel_axis(unit), recipe.norm if recipe.learns == "activations" else 2.0)
        self._give_streams(seed)
        learned_from, self.judged = samples.split(unit.count, recipe.judged_samples)
        size = samples.part(learned_from, unit.count, recipe.batch_size, self.ranks)
        own = self.ranks.own(learned_from, unit.count)
        last = rng_state(seed, (unit.index << 16) + 2**16 - 1, self.ranks.rank)
        order = samples.order(len(own), recipe.iterations * size, last)
        self.indices = own[order].view(recipe.iterations, size)
        self.schedule = schedule(recipe).to(self.device)
        self.row = self.schedule.new_zeros(self.schedule.shape[1])  # of the schedule, for this iteration
        self.parameters = Parameters(unit, recipe, self.row)
        self.phase = self._phase(0)
        self.best = Best(math.inf, math.inf, 0, {})
        self._differentiated: list[str] | None = None  # what had a gradient in the first step

    def _give_streams(self, seed: int) -> None:
        """Give every quantizer a random stream of its own, and every input of the unit one for its mix.

        A unit has 2¹⁶ streams, of which the last is that of the order of samples: rank r's order is of step r there.
        Weights have the same streams on all ranks, and what depends on samples has others on each.
        """
        weights, activations = self.quantizers, list(self.unit.activations.values())
        quantizers: list[Quantizer] = [*weights, *activations]
        first, each = self.unit.index << 16, len(activations) + len(self.unit.quantized)
        if len(weights) + each * self.ranks.size >= 2**16:
            raise ValueError(
                f"block {self.unit.name or 'model'} must have fewer than {2**16} random streams, got {len(weights)} "
                f"for its weights and {each} for each of {self.ranks.size} ranks; take fewer, or smaller blocks="
            )
        own = first + len(weights) + each * self.ranks.rank
        streams = [*range(first, first + len(weights)), *range(own, own + each)]
        self.rngs = torch.stack([rng_state(seed, stream) for stream in streams]).to(self.device)
        for quantizer, rng in zip(quantizers, self.rngs, strict=False):
            quantizer.rng = rng
        self.mixes = self.rngs[len(quantizers) :]

    # --- the loop

    @kept_memory()
    def learn(self, start: int, log: Callable[[int, float], None], save: Callable[[int], None], every: int) -> None:
        """All iterations from ``start`` on; ``best`` is then the best state that :meth:`judge` has seen.

        ``log`` is told the loss from time to time, ``save`` when to save.

        Raises:
            DivergenceError: a loss is not finite.
            ValueError: no weight has a gradient of the reconstruction loss, or the unit cannot be differentiated.
        """
        good, state, run = start, dict[str, torch.Tensor](), self.step
        self.parameters.copy_to(state)
        iterations, judgements = self.recipe.iterations, self._judgements()
        for i, batch in enumerate(self._batches(start), start):
            if i == start or self._phase(i) != self.phase:
                self.phase = self._phase(i)
                self._set_modes()
                run = self._graphed()
            self.row.copy_(self.schedule[i])
            error, loss = run(batch) if i > start else self._first(run, batch)
            done = i + 1
            due = every > 0 and done % every == 0 and done < iterations
            noted, judged = done % LOG_EVERY == 0 or done == iterations, done in judgements
            if due or noted or judged:
                if not self._finite(loss):
                    self.load(state, good)
                    raise self._divergence(good, done)
                good = done
                self.parameters.copy_to(state)
            if due or noted:
                log(done, float(error))
            if judged:
                self.judge(done)
            if due:
                save(done)

    def _first(self, run: Callable, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The first step, which shows whether autograd can follow the unit."""
        try:
            return run(batch)
        except FAULTS_OF_MACHINES:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"block {self.unit.name or 'model'} must be differentiable to be learned, got {type(error).__name__}: "
                f'{checks.short_reason(error)}; keep its layers in full precision with "float", or take a recipe that '
                'differentiates nothing: "gptq", "awq" or "rtn"'
            ) from error

    def step(self, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward, optimizer, the next noise; nothing is read on the host.

        The reconstruction loss is differentiated as far as the quantized weights, and what they are made of after
        that: a block that computes parts anew during its backward pass finds the weights of its forward pass.
        """
        self.parameters.optimizer.zero_grad()
        weights, regularizer = self._quantize_weights()
        leaves = [weight.detach().requires_grad_() for weight in weights]
        with substituted(self.quantizers, leaves):
            error = self._reconstruction_loss(batch)
            if error.requires_grad:
                error.backward()
        error = self._averaged(error.detach(), leaves)
        reached = [(weight, leaf.grad) for weight, leaf in zip(weights, leaves, strict=True) if leaf.grad is not None]
        if self.weights and not reached:
            raise self._unreached()
        loss = error
        roots, grads = [weight for weight, _ in reached], [grad for _, grad in reached]
        if isinstance(regularizer, torch.Tensor) and regularizer.requires_grad:
            loss = loss + regularizer.detach()
            roots, grads = [*roots, regularizer], [*grads, torch.ones_like(regularizer)]
        if roots:
            torch.autograd.backward(roots, grads)
        self.parameters.step()
        with torch.no_grad():
            self.rngs[:, 2] += 1
        return error, loss

    def _averaged(self, error: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
        """The loss of the whole batch; gradients, in place, are made those of it too.

        LSQ's factor of an activation's scale counts the elements of a rank's part, of which the batch has ``size``
        times as many: the mean gradient is divided by the root of that.

        Raises:
            ValueError: a rank, or this step, has gradients of other tensors than the others.
        """
        if self.ranks.size == 1:
            return error
        of_weights = {layer.name: leaf.grad for layer, leaf in zip(self.weights, leaves, strict=True)}
        of_others = {name: p.grad for name, p in self.parameters.by_name.items()}
        grads = {name: grad for name, grad in (of_weights | of_others).items() if grad is not None}
        if self._differentiated is None:
            self.ranks.check_same({f"gradients of block {self.unit.name or 'model'}": list(grads)})
            self._differentiated = list(grads)
        if list(grads) != self._differentiated:
            odd = sorted(set(self._differentiated).symmetric_difference(grads))
            raise ValueError(
                f"block {self.unit.name or 'model'} must have gradients of the same tensors in every step where ranks "
                f"share samples, got a step that differs in {checks.listed(odd)}; keep those in float, or use one "
                "process"
            )
        error = error.clone()
        self.ranks.average([error, *grads.values()])
        for name in self.unit.activations:
            if (grad := of_others[f"{name}.scale"]) is not None:
                grad *= self.ranks.size**-0.5
        return error

    def _reconstruction_loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        *inputs, target = batch
        count, entry = len(self.unit.quantized), self.unit.entry
        quantized, full = inputs[:count], inputs[count:] or inputs
        if entry is not None:  # full precision stays so in the mix
            quantized = [entry(quantized[0]), *quantized[1:]]
        mixed = [self._mixed(*each) for each in zip(quantized, full, self.mixes, strict=True)]
        with nullcontext() if entry is None else entry.passing():
            return self.loss(mixed, target)

    def _quantize_weights(self) -> tuple[list[torch.Tensor], torch.Tensor | float]:
        """The quantized weights of this step, layer by layer, and what is added to the reconstruction loss.

        That is ``λ Σ ‖w − w_src‖₂``, or the weighted penalties of AdaRound.
        """
        if self.recipe.learns == "rounding":
            pairs = [layer.weight_quantizer.adaround(layer.latent) for layer in self.weights]
            return [y for y, _ in pairs], self.row[ROUNDING_WEIGHT] * sum(penalty for _, penalty in pairs)
        quantized: dict[str, torch.Tensor] = {}
        total: torch.Tensor | float = 0.0
        for where in {tuple(quantizer.where.items()): quantizer.where for quantizer in self.quantizers}.values():
            layers = [layer for layer in self.weights if layer.weight_quantizer.where == where]
            quantizers = [layer.weight_quantizer for layer in layers]
            weights, distances = ops.quantize_weights(
                [layer.latent for layer in layers],
                [q.scale for q in quantizers],
                [(q.qmin, q.qmax) for q in quantizers],
                sources=[self.source[layer.name] for layer in layers] if self.source else None,
                rngs=[q.rng for q in quantizers] if quantizers[0].mode == "noise" else None,
                noise=self.recipe.noise,
                **where,
            )
            quantized.update(zip((layer.name for layer in layers), weights, strict=True))
            total = total if distances is None else total + distances.sum()
        return [quantized[layer.name] for layer in self.weights], self.recipe.distance * total

    def _mixed(self, quantized: torch.Tensor, full: torch.Tensor, rng: torch.Tensor) -> torch.Tensor:
        """Of the quantized prefix with probability ``input_keep``, element by element, else of full precision."""
        if quantized is full or not quantized.is_floating_point():
            return quantized
        return ops.drop_mix(quantized, full, self.recipe.input_keep, rng)

    def _batches(self, start: int) -> Iterator[list[torch.Tensor]]:
        mixes = self.recipe.input_keep < 1 and self.unit.full is not self.unit.quantized
        sources = [*self.unit.quantized, *(self.unit.full if mixes else []), self.unit.target]
        return batches(sources, self.indices[start:])

    def _graphed(self) -> Callable:
        if self.graph is False or self.device.type != "cuda" or self.ranks.size > 1:
            return self.step
        return Graph(self.step, self.graph is True, self.device)

    def _phase(self, iteration: int) -> str:
        if self.recipe.learns == "rounding":
            return "adaround"
        return "noise" if iteration < self.recipe.iterations - self._quiet else "round"

    @property
    def _quiet(self) -> int:
        """How many iterations, at the end, have no noise in place of rounding."""
        iterations = self.recipe.iterations
        return round(self.recipe.fake_quant_fraction * iterations) if self.recipe.learns == "weights" else iterations

    def _set_modes(self) -> None:
        for quantizer in self.quantizers:
            quantizer.mode = self.phase
        for activation in self.unit.activations.values():
            activation.mode = "noise" if self.phase == "noise" and self.recipe.noise_activations else "round"
            activation.noise, activation.keep = self.recipe.noise, self.recipe.activation_keep

    def state(self) -> dict[str, torch.Tensor]:
        """All that learning goes on from, the best state too."""
        measures = torch.tensor([self.best.objective, self.best.loss, self.best.iteration], dtype=torch.float64)
        kept = {f"best/{name}": tensor for name, tensor in self.best.tensors.items()}
        return {**self.parameters.state(), **kept, "best": measures}

    def load(self, tensors: Mapping[str, torch.Tensor], iteration: int) -> None:
        """Go back to a state that was taken when ``iteration`` steps were done."""
        self.parameters.load(tensors)
        self.rngs[:, 2] = iteration
        if "best" in tensors:
            objective, loss, at = tensors["best"].tolist()
            names = self.parameters.by_name
            self.best = Best(objective, loss, int(at), {n: tensors[f"best/{n}"].to(self.device) for n in names})

    def _step_of(self, batch: list[torch.Tensor], module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`step`, as a run of the unit's module that can be observed."""
        return self.step(batch)

    def _unreached(self) -> ValueError:
        """A unit of which no weight has a gradient cannot be learned; what the distance alone moves is not meant."""
        return ValueError(
            f"block {self.unit.name or 'model'} must pass a gradient from its output to its weights, got none for "
            f"{checks.listed(layer.name for layer in self.weights)}: its forward runs under torch.no_grad or "
            "inference_mode, or checkpoints with use_reentrant=True; take that out, or keep its layers in full "
            'precision with "float"'
        )

    # --- which state is kept

    def _judgements(self) -> set[int]:
        """After how many iterations the unit is judged: at each quarter of those without noise, and at the end."""
        return {self.recipe.iterations - quarter * self._quiet // 4 for quarter in range(4)}

    @torch.no_grad()
    def judge(self, iteration: int) -> None:
        """Keep the unit's state if none before was as good on the samples that judge it.

        Good is a low ``reconstruction loss + λ Σ ‖W − W_src‖₂``.
        """
        loss = self.rounded_loss(self.judged)
        objective = loss + self._distance()
        if not objective >= self.best.objective:  # the first is kept, even if it is NaN
            tensors = {name: p.detach().clone() for name, p in self.parameters.by_name.items()}
            self.best = Best(objective, loss, iteration, tensors)

    @kept_memory()
    @torch.no_grad()
    def rounded_loss(self, index: torch.Tensor) -> float:
        """The reconstruction loss on the samples of these numbers, with weights rounded for good."""
        for activation in self.unit.activations.values():
            activation.mode, activation.keep = "round", 1.0
        rounded = [layer.weight_quantizer.rounded(layer.latent) for layer in self.weights]
        with substituted(self.quantizers, rounded):
            loss = self.loss.measured(index, max(self.recipe.batch_size, AT_ONCE))  # a step may have fewer
        self._set_modes()
        return loss

    def _distance(self) -> float:
        """``λ Σ ‖W − W_src‖₂`` of the weights as they are."""
        norms = [torch.linalg.vector_norm(each.latent - self.source[each.name]) for each in self.weights if self.source]
        return self.recipe.distance * float(sum(norms))

    # --- divergence

    def _finite(self, loss: torch.Tensor) -> bool:
        return bool(loss.isfinite() & self.parameters.all_finite().all())

    def _divergence(self, good: int, done: int) -> DivergenceError:
        """Run again from the last good state, looking at every iteration; then go back to it."""
        state = dict[str, torch.Tensor]()
        self.parameters.copy_to(state)
        broken_layers: list[str] = []

        def note(name, module, args, kwargs, output) -> None:
            if not module.weight.isfinite().all() or not output.isfinite().all():
                broken_layers.append(names[name])

        start = len(self.unit.name) + 1 if self.unit.name else 0
        names = {layer.name[start:]: layer.name for layer in self.unit.layers}
        for i, batch in zip(range(good, done), self._batches(good), strict=False):
            self.phase = self._phase(i)
            self._set_modes()
            self.row.copy_(self.schedule[i])
            broken_layers.clear()
            _, loss = observe(self.unit.module, partial(self._step_of, batch), after=note, names=names)
            if not self._finite(loss):
                break
        broken = [name for name, p in self.parameters.by_name.items() if not p.isfinite().all()]
        broken_layers = [name for found in self.ranks.gather(broken_layers) for name in found]
        self.load(state, good)
        layer = (broken_layers or [name.rpartition(".")[0] for name in broken] or ["none: the loss itself"])[0]
        return DivergenceError(self.unit.name, layer, i + 1, float(loss), good)
