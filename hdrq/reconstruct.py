"""The block-wise loop: quantize a model, one block after the other, so that each block's output is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.model import (
    QuantizedLayer,
    attach_quantizers,
    check_float,
    find_blocks,
    fold_batchnorm,
    hooks,
    input_quantizers,
    quantized_layers,
    set_origin,
)
from hdrq.quantizers import ActivationQuantizer
from hdrq.recipes import Recipe
from hdrq.recipes import recipe as make_recipe
from hdrq.rng import rng_state

SMALLEST_SCALE = 1e-8
LOG_EVERY = 50  # iterations between two readings of the loss: each waits for the device


@dataclass(frozen=True)
class Step:
    """Where a reconstruction is: what the caller's ``progress`` is told."""

    block: str
    index: int  # of the block
    blocks: int
    iteration: int  # iterations of this block that are done
    iterations: int
    loss: float  # reconstruction loss at the last reading


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple
    kwargs: Mapping

    def __call__(self, module: nn.Module):
        return module(*self.args, **self.kwargs)


@torch.inference_mode(False)
@torch.enable_grad()
def quantize(
    model: nn.Module,
    calibration: torch.Tensor | Iterable,
    recipe: str | Recipe = "hdrq",
    *,
    bits: str | Mapping[str, str] = "W4A4",
    source: nn.Module | None = None,
    preset: str = "paper",
    seed: int = 0,
    iterations: int | None = None,
    progress: Callable[[Step], None] | None = None,
    **knobs,
) -> nn.Module:
    """Quantize a model after training, from unlabelled data.

    BatchNorm is folded; weights and inputs of every convolution and linear layer get quantizers
    (:func:`hdrq.model.attach_quantizers` says where); then, block by block in forward order, weights and scales are
    learned so that the block's output stays that of the full-precision model::

        mean over batch and positions of Σ_channels (B_q(x) − B(x))²  +  λ·Σ_layers ‖W − W_src‖₂

    Args:
        model: in evaluation mode; it is left as it was.
        calibration: a tensor, or an iterable of batches: each a tensor, a tuple or a dict of the model's arguments.
        recipe: ``"hdrq"``, ``"rtn"`` (round to nearest), or a :class:`hdrq.recipes.Recipe`.
        bits: ``"W4A4"``, with 8 bits for the first and the last layer; or patterns of layer names,
            ``{"stem*": "W8A8", "*": "W4A4"}``, of which the first that matches decides.
        source: the model before its adaptation; needed where the recipe has a distance.
        preset: ``"paper"`` or ``"official"``.
        seed: of the batches, the noise and the drops: the same seed gives the same bits on the same machine.
        iterations: for each block; None for the recipe's.
        progress: called with a :class:`Step` from time to time.
        knobs: any other field of the recipe.

    Returns:
        A model of the same class, its weights on the grid; :func:`hdrq.model.quantized_layers` lists its quantizers.

    Raises:
        TypeError, ValueError: "X must be …, got …".
        FloatingPointError: a loss is not finite; the message names block and iteration.

    Source: HDRQ (Shin et al., ICML 2025); QDrop (Wei et al., ICLR 2022); BRECQ (Li et al., ICLR 2021).
    """
    if iterations is not None:
        knobs["iterations"] = iterations
    plan = make_recipe(recipe, preset, **knobs)
    seed = checks.integer("seed", seed, 0, 2**63 - 1)
    check_module("model", model)
    batches = calibration_calls(calibration)
    learns = plan.iterations > 0
    if learns and plan.distance > 0 and source is None:
        raise ValueError("source must be the model before its adaptation where distance > 0, got None; or distance=0")

    full, folded = prepare_float(model, batches)
    quantized = copy.deepcopy(full)
    attach_quantizers(quantized, run_all(first_samples(batches, plan.range_samples)), bits, plan)
    if learns:
        pull = {} if source is None or plan.distance == 0 else source_weights(source, quantized, batches)
        _reconstruct(quantized, full, batches, plan, pull, seed, progress)
    policy = bits if isinstance(bits, str) else dict(bits)
    set_origin(quantized, {"folded": folded, "recipe": asdict(plan), "bits": policy, "seed": seed})
    return _finish(quantized)


def check_module(name: str, model: nn.Module) -> None:
    """``model`` is a module in full precision and in evaluation mode."""
    check_float(name, model)
    if model.training:
        raise ValueError(f"{name} must be in evaluation mode, got training mode; call {name}.eval()")


def calibration_calls(calibration) -> list[Call]:
    """Calibration data as calls of the model."""
    if isinstance(calibration, torch.Tensor):
        calibration = calibration.split(256) if calibration.ndim else [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be a tensor or an iterable of batches, got {type(calibration).__name__}")
    calls: list[Call] = []
    for batch in calibration:
        if isinstance(batch, Mapping):
            call = Call((), dict(batch))
        else:
            call = Call(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})
        tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor)]
        if not tensors or any(t.is_floating_point() and not t.isfinite().all() for t in tensors):
            what = "a batch without a tensor" if not tensors else "NaN or infinity"
            raise ValueError(f"calibration must be batches of finite tensors, got {what} in batch {len(calls)}")
        if tensors[0].ndim == 0:
            raise ValueError(f"calibration must have samples along the first axis, got a scalar in batch {len(calls)}")
        if len(tensors[0]) > 0:
            calls.append(call)
    if not calls:
        raise ValueError("calibration must have at least one sample, got none")
    return calls


def first_samples(batches: list[Call], count: int) -> list[Call]:
    """The calls that hold the first ``count`` samples."""
    calls: list[Call] = []
    for call in batches:
        size = next(t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor)).shape[0]
        calls.append(_at(call, torch.arange(min(size, count))))
        count -= size
        if count <= 0:
            break
    return calls


def run_all(batches: list[Call]) -> Callable:
    """A function that runs a model on all batches, and returns the outputs."""

    @torch.no_grad()
    def run(model: nn.Module) -> list:
        return [call(model) for call in batches]

    return run


def prepare_float(model: nn.Module, batches: list[Call]) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a model with BatchNorm folded and no gradients, and what was folded into what."""
    full = copy.deepcopy(model).requires_grad_(False)
    folded = fold_batchnorm(full, run_all(batches[:1]))
    return full, folded


def fold(model: nn.Module, example) -> nn.Module:
    """A copy of a model, in full precision, with its BatchNorm folded; ``example`` is data that it runs on."""
    return prepare_float(model, calibration_calls(example))[0]


def source_weights(source: nn.Module, model: nn.Module, batches: list[Call]) -> dict[str, torch.Tensor]:
    """The source's weight, its own BatchNorm folded, for each quantized layer of a model."""
    check_module("source", source)
    full, _ = prepare_float(source, batches)
    modules = dict(full.named_modules())
    weights, wrong = {}, []
    for name, layer in quantized_layers(model).items():
        theirs = getattr(modules.get(name), "weight", None)
        if theirs is None or theirs.shape != layer.latent.shape:
            got = "missing" if theirs is None else tuple(theirs.shape)
            wrong.append(f"{name} ({tuple(layer.latent.shape)}, got {got})")
        else:
            weights[name] = theirs.detach().to(layer.latent)
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"source must have the layers of model, got others: {'; '.join(wrong[:10])}{more}")
    return weights


def _reconstruct(model, full, batches, plan: Recipe, pull, seed: int, progress) -> None:
    blocks = find_blocks(model, run_all(batches[:1]))
    streams = iter(range(2**31))
    layers, inputs = quantized_layers(model), input_quantizers(model)
    for quantizer in (*(layer.weight_quantizer for layer in layers.values()), *inputs.values()):
        quantizer.rng = rng_state(seed, next(streams), device=quantizer.scale.device)

    def within(block: str, named: Mapping) -> list:
        return [value for name, value in named.items() if name == block or name.startswith(f"{block}.")]

    for index, name in enumerate(blocks):
        own = within(name, layers)
        x_fp, target = _capture(full, name, batches)
        x_q, _ = _capture(model, name, batches)
        mix = rng_state(seed, next(streams), device=own[0].latent.device)
        source = {layer.name: pull[layer.name] for layer in own if pull}
        block = Block(name, model.get_submodule(name), own, within(name, inputs), source)

        def tell(iteration: int, loss: float, name=name, index=index) -> None:
            if progress is not None:
                progress(Step(name, index, len(blocks), iteration, plan.iterations, loss))

        block.reconstruct(x_q, x_fp, target, plan, mix, torch.Generator().manual_seed(seed + index), tell)


class _Stop(Exception):
    """Raised by a hook once a block has run: what follows it is not needed."""


def _capture(model: nn.Module, name: str, batches: list[Call]) -> tuple[Call, torch.Tensor]:
    """The arguments with which a block is called, and its output, over all batches."""
    calls: list[Call] = []
    outputs: list[torch.Tensor] = []

    def hook(module, args, kwargs, output):
        calls.append(Call(args, kwargs))
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])
        raise _Stop

    with hooks([model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)]), torch.no_grad():
        for call in batches:
            with suppress(_Stop):
                call(model)
    args = tuple(_joined(values) for values in zip(*(c.args for c in calls), strict=True))
    kwargs = {key: _joined([c.kwargs[key] for c in calls]) for key in calls[0].kwargs}
    return Call(args, kwargs), torch.cat(outputs)


def _joined(values):
    """The same argument over all batches: tensors one after the other, anything else as it is."""
    return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else values[0]


@dataclass(frozen=True)
class Block:
    """A unit of reconstruction: a module, its quantizers, and the source's weights for its layers."""

    name: str
    module: nn.Module
    layers: list[QuantizedLayer]
    activations: list[ActivationQuantizer]
    source: Mapping[str, torch.Tensor]

    def reconstruct(self, x_q: Call, x_fp: Call, target: torch.Tensor, plan: Recipe, mix, generator, tell) -> None:
        """Learn weights and scales so that the block's output on quantized inputs is ``target``."""
        weights = [layer.latent for layer in self.layers]
        quantizers = [*(layer.weight_quantizer for layer in self.layers), *self.activations]
        scales = [quantizer.scale for quantizer in quantizers]
        for parameter in (*weights, *scales):
            parameter.requires_grad_(True)
        optimizer, schedule = self._optimizer(plan)
        first_rounded = plan.iterations - round(plan.tail * plan.iterations)
        self._set_modes("noise", plan)
        for i in range(plan.iterations):
            if i == first_rounded:
                self._set_modes("round", plan)
            index = torch.randint(len(target), (min(plan.batch_size, len(target)),), generator=generator)
            call = _mixed(_at(x_q, index), _at(x_fp, index), plan.input_keep, mix)
            output = call(self.module)
            output = output if isinstance(output, torch.Tensor) else output[0]
            error = reconstruction_loss(output, target[index])
            loss = error + plan.distance * self._distance() if self.source else error
            told = (i + 1) % LOG_EVERY == 0 or i + 1 == plan.iterations
            if told or loss.device.type == "cpu":  # elsewhere reading it would wait for the device
                self._check_loss(i + 1, float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for scale in scales:
                    scale.clamp_(min=SMALLEST_SCALE)
                for rng in (mix, *(q.rng for q in quantizers)):
                    rng[2] += 1
            if told:
                tell(i + 1, float(error.detach()))
        for quantizer in quantizers:
            quantizer.mode = "round"
        for activation in self.activations:
            activation.keep = 1.0
        for parameter in (*weights, *scales):
            parameter.requires_grad_(False)

    def _optimizer(self, plan: Recipe):
        """Adam over weights, their scales, and the activations' scales, with their schedules."""
        groups = [{"params": [layer.latent for layer in self.layers], "lr": plan.weight_lr}]
        for layer in self.layers:
            scale = layer.weight_quantizer.scale
            rate = min(plan.weight_lr, plan.scale_step * float(scale.detach().mean()))
            groups.append({"params": [scale], "lr": rate})
        groups.append({"params": [activation.scale for activation in self.activations], "lr": plan.activation_lr})
        rates = [_warm_cosine(plan)] * (len(groups) - 1) + [_cosine(plan)]
        optimizer = torch.optim.Adam(groups, foreach=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)

    def _set_modes(self, mode: str, plan: Recipe) -> None:
        for layer in self.layers:
            layer.weight_quantizer.mode, layer.weight_quantizer.noise = mode, plan.noise
        for activation in self.activations:
            activation.mode, activation.noise = (mode if plan.noise_activations else "round"), plan.noise
            activation.keep = plan.activation_keep

    def _distance(self) -> torch.Tensor:
        return torch.stack([ops.source_distance(layer.latent, self.source[layer.name]) for layer in self.layers]).sum()

    def _check_loss(self, iteration: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss of block {self.name} must be finite, got {loss} at iteration {iteration}")


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``mean over batch and positions of Σ_channels (output − target)²``; tokens (B, N, C) have their channels last."""
    return (output - target).square().sum(dim=-1 if output.ndim == 3 else 1).mean()


def _at(call: Call, index: torch.Tensor) -> Call:
    def pick(value):
        return value[index.to(value.device)] if isinstance(value, torch.Tensor) else value

    return Call(tuple(pick(a) for a in call.args), {k: pick(v) for k, v in call.kwargs.items()})


def _mixed(quantized: Call, full: Call, keep: float, rng: torch.Tensor) -> Call:
    """Inputs of the quantized prefix with probability ``keep``, element by element, else those of full precision."""

    def mix(a, b):
        floats = isinstance(a, torch.Tensor) and a.is_floating_point()
        return ops.drop_mix(a, b, keep, rng) if floats and keep < 1 else a

    args = tuple(mix(a, b) for a, b in zip(quantized.args, full.args, strict=True))
    return Call(args, {k: mix(v, full.kwargs[k]) for k, v in quantized.kwargs.items()})


def _cosine(plan: Recipe) -> Callable[[int], float]:
    return lambda i: 0.5 * (1 + math.cos(math.pi * i / plan.iterations))


def _warm_cosine(plan: Recipe) -> Callable[[int], float]:
    warm = round(plan.warmup * plan.iterations)

    def rate(i: int) -> float:
        if i < warm:
            return 1e-3 + (1 - 1e-3) * i / warm
        return 0.5 * (1 + math.cos(math.pi * (i - warm) / max(plan.iterations - warm, 1)))

    return rate


@torch.no_grad()
def _finish(model: nn.Module) -> nn.Module:
    """Put every weight on its grid: what the integers and scales say, and nothing else."""
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        layer.latent.copy_(quantizer.values(quantizer.codes(layer.latent)))
    return model.requires_grad_(False)
