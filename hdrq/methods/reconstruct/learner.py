"""One block while it is learned: its parameters, its step, its schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks, ops
from hdrq.backends.eager import per_element
from hdrq.calibrate.cache import Rows, batches
from hdrq.calibrate.progress import LOG_EVERY
from hdrq.calibrate.trace import Node
from hdrq.errors import DivergenceError
from hdrq.methods.reconstruct.biases import learned_bias, settle_bias
from hdrq.methods.reconstruct.graph import Graph
from hdrq.methods.reconstruct.memory import kept_memory
from hdrq.methods.reconstruct.schedule import reconstruction_loss, schedule
from hdrq.prepare.observe import hooks
from hdrq.quantizers.layers import QuantizedLayer
from hdrq.quantizers.modules import ActivationQuantizer, Quantizer
from hdrq.recipes import Recipe
from hdrq.rng import rng_state

SMALLEST_SCALE, LARGEST_SCALE = 1e-8, 1e30
MEASURED = 256  # samples on which the losses of the report are taken
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's state of a parameter


@dataclass(frozen=True)
class Data:
    """What a block learns from: rows of its inputs, quantized and in full precision, and of its targets."""

    quantized: list[Rows]
    full: list[Rows]
    target: Rows

    @property
    def count(self) -> int:
        return len(self.target.tensor)


class Learner:
    """A block, what of it is learned, and the state of the optimizer.

    Args:
        node: the block's name, and how its arguments and results are made of rows.
        module: the quantized block.
        layers, activations: its quantizers, by name.
        source: the source's weights for its layers; empty where no distance is asked for.
        seed, index: decide batches and random streams.
        graph: ``"auto"`` (a CUDA graph on a GPU), True or False.
    """

    def __init__(
        self,
        node: Node,
        module: nn.Module,
        layers: list[QuantizedLayer],
        activations: Mapping[str, ActivationQuantizer],
        source: Mapping[str, torch.Tensor],
        data: Data,
        plan: Recipe,
        seed: int,
        index: int,
        graph: bool | str = "auto",
    ) -> None:
        self.node, self.module, self.layers, self.activations = node, module, layers, activations
        self.source, self.data, self.plan, self.graph = source, data, plan, graph
        self.device = data.target.device
        self.generator = torch.Generator().manual_seed(seed + index)
        size = min(plan.batch_size, data.count)
        self.indices = torch.randint(data.count, (plan.iterations, size), generator=self.generator)
        quantizers = self._quantizers
        streams = range(index << 16, (index << 16) + len(quantizers) + 1)
        self.rngs = torch.stack([rng_state(seed, stream) for stream in streams]).to(self.device)
        for quantizer, rng in zip(quantizers, self.rngs, strict=False):
            quantizer.rng = rng
        self.mix = self.rngs[-1]
        self.now = torch.zeros(5, device=self.device)  # this iteration's row of the schedule
        self.schedule = schedule(plan).to(self.device)

        self.learned: dict[str, torch.Tensor] = {
            f"{name}.scale": quantizer.scale for name, quantizer in activations.items()
        }
        weights: list[torch.Tensor] = []
        for layer in layers:
            own = self._prepare(layer)
            self.learned.update({f"{layer.name}.{part}": value for part, value in own.items()})
            weights += own.values()
        biased = [layer for layer in layers if getattr(layer.module, "bias", None) is not None]
        biases = {f"{layer.name}.bias": learned_bias(layer) for layer in biased} if plan.bias_lr > 0 else {}
        self.learned.update(biases)
        inputs = [quantizer.scale for quantizer in activations.values()]
        scales = [p for p in self.learned.values() if any(p is q.scale for q in quantizers)]
        self.scales = _together(scales, self.device)
        bounds = [
            _bound(p, plan.scale_step, plan) if any(p is w for w in weights) else torch.ones_like(p) for p in scales
        ]
        self.bounded = [self.scales]  # learn at a share of their rate: the scales, all in one tensor, then weights
        self.bounds = [torch.cat([torch.zeros(0, device=self.device), *(bound.flatten() for bound in bounds)])]
        if plan.learns == "weights" and plan.weight_step > 0:
            holders = {id(layer.latent): layer for layer in layers}.values()  # a weight may be that of two layers
            self.bounded += [layer.latent for layer in holders]
            self.bounds += [_bound(_broadcast_scale(layer), plan.weight_step, plan) for layer in holders]
        for p in self.learned.values():
            p.requires_grad_(True)
        groups = [
            {"params": list({id(p): p for p in own}.values()), "lr": rate}
            for own, rate in ((weights, self.now[0]), (inputs, self.now[1]), (biases.values(), self.now[4]))
            if own
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=self.device.type == "cuda")

    def _prepare(self, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
        """What of a layer's weight is learned. Latents are float32, whatever the weight is."""
        quantizer, latent = layer.weight_quantizer, layer.latent
        quantizer.dtype, quantizer.noise = latent.dtype, self.plan.noise
        latent.data = latent.data.float()
        if self.plan.learns == "weights":
            return {"weight": latent, "weight_scale": quantizer.scale}
        quantizer.alpha = ops.adaround_init(latent.detach(), quantizer.scale.detach(), axis=quantizer.axis)
        quantizer.beta = self.now[2:3]
        return {"alpha": quantizer.alpha}

    @property
    def _quantizers(self) -> list[Quantizer]:
        return [*(layer.weight_quantizer for layer in self.layers), *self.activations.values()]

    # --- the loop

    @kept_memory()
    def learn(self, start: int, log: Callable[[int, float], None], save: Callable[[int], None], every: int) -> None:
        """All iterations from ``start`` on. ``log`` is told the loss from time to time, ``save`` when to save.

        Raises:
            DivergenceError: a loss is not finite.
        """
        good, state, phase, run = start, self.state(copy=True), "", self.step
        for i, batch in enumerate(self._batches(start), start):
            if self._phase(i) != phase:
                phase = self._phase(i)
                self._set_modes(phase)
                run = self._graphed()
            self.now.copy_(self.schedule[i])
            error, loss = run(batch)
            done = i + 1
            due = every > 0 and done % every == 0 and done < self.plan.iterations
            if due or done % LOG_EVERY == 0 or done == self.plan.iterations:
                if not self._sound(loss):
                    self.load(state, good)
                    raise self._diverged(good, done)
                good, state = done, self.state(copy=True)
                log(done, float(error))
            if due:
                save(done)

    def step(self, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward, optimizer, the next noise; nothing is read on the host."""
        self.optimizer.zero_grad()
        error, loss = self.losses(batch)
        loss.backward()
        before = [p.detach().clone() for p in self.bounded]
        self.optimizer.step()
        with torch.no_grad():  # rates are bounded; no scale leaves what a scale may be
            for p, old, bound in zip(self.bounded, before, self.bounds, strict=True):
                p.copy_(torch.lerp(old, p, bound))
            finite = torch.where(self.scales.isfinite(), self.scales, before[0])
            self.scales.copy_(finite.clamp_(SMALLEST_SCALE, LARGEST_SCALE))
            self.rngs[:, 2] += 1
        return error.detach(), loss.detach()

    def losses(self, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The reconstruction loss, and the sum of all losses."""
        *inputs, target = batch
        count = len(self.data.quantized)
        mixed = [self._mixed(*pair) for pair in zip(inputs, inputs[count:] or inputs, strict=False)]
        distance = self._quantize_weights()
        with parametrize.cached():
            error = self._error(mixed, target)
        for layer in self.layers:
            layer.weight_quantizer.ready = None
        loss = error
        if self.source:
            loss = loss + self.plan.distance * distance
        if self.plan.learns == "rounding":
            penalties = [layer.weight_quantizer.penalty for layer in self.layers]
            loss = loss + self.now[3] * sum(p for p in penalties if p is not None)
        return error, loss

    def _quantize_weights(self) -> torch.Tensor | float:
        """Make the weights of this step ready, layers of a kind in one pass; the sum of the distances to the source."""
        total: torch.Tensor | float = 0.0
        for axis in dict.fromkeys(layer.weight_quantizer.axis for layer in self.layers):
            layers = [layer for layer in self.layers if layer.weight_quantizer.axis == axis]
            quantizers = [layer.weight_quantizer for layer in layers]
            if quantizers[0].mode == "adaround":
                continue
            weights, distances = ops.quantize_weights(
                [layer.latent for layer in layers],
                [q.scale for q in quantizers],
                [(q.qmin, q.qmax) for q in quantizers],
                sources=[self.source[layer.name] for layer in layers] if self.source else None,
                rngs=[q.rng for q in quantizers] if quantizers[0].mode == "noise" else None,
                noise=self.plan.noise,
                axis=axis,
            )
            for quantizer, weight in zip(quantizers, weights, strict=True):
                quantizer.ready = weight
            total = total if distances is None else total + distances.sum()
        return total

    def _mixed(self, quantized: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """Of the quantized prefix with probability ``input_keep``, element by element, else of full precision."""
        if quantized is full or not quantized.is_floating_point():
            return quantized
        return ops.drop_mix(quantized, full, self.plan.input_keep, self.mix)

    def _error(self, inputs: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.node.inputs.build(inputs)
        outputs, main = self.node.outputs, self.node.outputs.main
        leaf, output = outputs.batched[main], outputs.split(self.module(*args, **kwargs))[main]
        return reconstruction_loss(leaf.tensor(output), leaf.tensor(target))

    def _batches(self, start: int) -> Iterator[list[torch.Tensor]]:
        mixes = self.plan.input_keep < 1 and self.data.full is not self.data.quantized
        sources = [*self.data.quantized, *(self.data.full if mixes else []), self.data.target]
        return batches(sources, self.indices[start:])

    def _graphed(self) -> Callable:
        return self.step if self.graph is False or self.device.type != "cuda" else Graph(self.step, self.graph is True)

    def _phase(self, iteration: int) -> str:
        if self.plan.learns == "rounding":
            return "adaround"
        return "noise" if iteration < self.plan.iterations - round(self.plan.tail * self.plan.iterations) else "round"

    def _set_modes(self, phase: str) -> None:
        for layer in self.layers:
            layer.weight_quantizer.mode = phase
        for activation in self.activations.values():
            activation.mode = "noise" if phase == "noise" and self.plan.noise_activations else "round"
            activation.noise, activation.keep = self.plan.noise, self.plan.activation_keep

    # --- state

    def state(self, copy: bool = False) -> dict[str, torch.Tensor]:
        """The learned tensors and the optimizer's moments, by name."""
        tensors = {}
        for name, p in self.learned.items():
            tensors[name] = p.detach()
            tensors.update(
                {f"{name}/{key}": self.optimizer.state[p][key] for key in MOMENTS if self.optimizer.state[p]}
            )
        return {name: value.clone() for name, value in tensors.items()} if copy else tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], iteration: int) -> None:
        """Go back to a state that was taken when ``iteration`` steps were done."""
        for name, p in self.learned.items():
            p.copy_(tensors[name])
            moments = {key: tensors[f"{name}/{key}"] for key in MOMENTS if f"{name}/{key}" in tensors}
            self.optimizer.state[p] = {key: value.to(self.device, copy=True) for key, value in moments.items()}
        self.rngs[:, 2] = iteration

    @torch.no_grad()
    def finish(self) -> None:
        """Round for good; leave nothing of the loop behind."""
        for layer in self.layers:
            quantizer = layer.weight_quantizer
            if quantizer.alpha is not None:
                grid = (quantizer.scale, quantizer.alpha.detach(), quantizer.qmin, quantizer.qmax)
                layer.latent.copy_(ops.adaround(layer.latent, *grid, axis=quantizer.axis, hard=True))
            quantizer.alpha = quantizer.beta = quantizer.penalty = quantizer.ready = None
            settle(layer)
            quantizer.dtype = None
            settle_bias(layer)
        for each in self._quantizers:
            each.mode, each.scale.data, each.rng = "round", each.scale.data.clone(), each.rng.clone()
        for activation in self.activations.values():
            activation.keep = 1.0
        for p in self.learned.values():
            p.requires_grad_(False).grad = None

    # --- what is wrong, and how good it is

    @kept_memory()
    @torch.no_grad()
    def measure(self) -> float:
        """The reconstruction loss of the block as it is, on the first samples."""
        few, size, total = min(MEASURED, self.data.count), self.plan.batch_size, 0.0
        for start in range(0, few, size):
            span = start, min(start + size, few)
            error = self._error([x.read(*span) for x in self.data.quantized], self.data.target.read(*span))
            total += float(error) * (span[1] - span[0])
        return total / few

    def _sound(self, loss: torch.Tensor) -> bool:
        return bool(torch.stack([loss.isfinite(), *(p.isfinite().all() for p in self.learned.values())]).all())

    def _diverged(self, good: int, done: int) -> DivergenceError:
        """Run again from the last good state, looking at every iteration; then go back to it."""
        state = self.state(copy=True)
        for i, batch in zip(range(good, done), self._batches(good), strict=False):
            self._set_modes(self._phase(i))
            self.now.copy_(self.schedule[i])
            seen: list[str] = []
            with hooks(layer.module.register_forward_hook(_look(layer.name, seen)) for layer in self.layers):
                _, loss = self.step(batch)
            if not self._sound(loss):
                break
        broken = [name for name, p in self.learned.items() if not p.isfinite().all()]
        self.load(state, good)
        layer = (seen or [name.rpartition(".")[0] for name in broken] or ["none: the loss itself"])[0]
        return DivergenceError(self.node.name, layer, i + 1, float(loss), good)


def _look(name: str, seen: list[str]) -> Callable:
    def hook(module, args, output):
        if not module.weight.isfinite().all() or not output.isfinite().all():
            seen.append(name)

    return hook


@torch.no_grad()
def settle(layer: QuantizedLayer) -> None:
    """Put a weight on its grid: what the integers and the scale say, and nothing else."""
    quantizer, latent = layer.weight_quantizer, layer.latent
    latent.data = quantizer.values(quantizer.codes(latent)).to(quantizer.dtype or latent.dtype)


def _bound(scale: torch.Tensor, step: float, plan: Recipe) -> torch.Tensor:
    """The share of the weights' rate to learn at, so that the rate is at most ``step`` of a scale."""
    return (step * scale.detach() / max(plan.weight_lr, 1e-30)).clamp(max=1)


def _broadcast_scale(layer: QuantizedLayer) -> torch.Tensor:
    """A weight's scales, in a shape that broadcasts over it."""
    quantizer, latent = layer.weight_quantizer, layer.latent
    return per_element(quantizer.scale, latent.ndim, checks.axis_of(latent, quantizer.axis))


def _together(parameters: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One tensor in whose memory all parameters lie from now on."""
    flat = torch.cat([torch.zeros(0, device=device), *(p.detach().flatten() for p in parameters)])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return flat
