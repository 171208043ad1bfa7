"""One low-bit model of several experts in full precision: merged, calibrated towards the experts, and quantized."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.data import Call, calibration_calls, check_call, data_hash, first_samples, run_all
from hdrq.calibrate.moments import Moments, second_moments
from hdrq.calibrate.progress import Step
from hdrq.calibrate.ranges import REACHING, search_weight_scale
from hdrq.calibrate.report import report_of, set_report
from hdrq.calibrate.sequential import Method, Unit
from hdrq.calibrate.settings import RunSettings
from hdrq.checkpoint.saving import check_storable
from hdrq.checkpoint.states import put_state
from hdrq.checkpoint.workdir import fingerprint, opened, state_hash
from hdrq.checks import listed
from hdrq.merging.float_merges import FloatMerge, merged_floats
from hdrq.methods.awq import AWQ
from hdrq.methods.layerwise import BIASES, WEIGHTINGS, LayerWise, Target
from hdrq.methods.post_training import fit
from hdrq.methods.reconstruct.method import Reconstruction
from hdrq.prepare.copying import copy_model
from hdrq.prepare.float_model import check_module, prepare_float
from hdrq.prepare.offload import Offload
from hdrq.quantizers.layers import quantized_layers
from hdrq.recipes import Recipe
from hdrq.recipes import recipe as make_recipe

LEARNED = ("hdrq", "qdrop", "brecq")
METHODS = ("epmq", "gptq", "awq", "rtn", "regmean", *LEARNED)
LAM = {"epmq": 0.01, "gptq": 0.0, "regmean": 0.0}
STREAMS = ("merged", "experts")


@torch.inference_mode(False)
@torch.enable_grad()
def post_merge(
    experts: Sequence[nn.Module],
    calibration: Sequence[Any],
    base: nn.Module | None = None,
    *,
    merge: str = "average",
    method: str = "epmq",
    bits: str | Mapping[str, str] = "W4A16",
    group_size: int | None = 128,
    lam: float | None = None,
    weighting: str = "count",
    stream: str | None = None,
    bias: str | None = None,
    merge_options: Mapping[str, Any] | None = None,
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    held_out: Any = None,
    cache: str = "auto",
    cache_bytes: int | None = None,
    offload_folder: str | os.PathLike | None = None,
    workdir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: Callable[[Step], None] | bool = True,
    **knobs: Any,
) -> nn.Module:
    """Merge experts in full precision and quantize the merge, guided by the experts' outputs on a few samples of each.

    The experts are merged (:class:`hdrq.merging.float_merges.FloatMerge`); the merge is prepared as
    :func:`hdrq.quantize` prepares a model, and so is each expert. Then, layer by layer in forward order, with W_m and
    W_t the merge's and the experts' weights and X_t what the layer reads on the samples of task t::

        min over Q on the grid of Σ_t a_t·‖Q·X_tᵀ − W_t·X_tᵀ‖² + λ·‖Q − W_m‖²

    is solved for any weight (:func:`hdrq.calibrate.least_squares.anchored`), and the solution W* is rounded by GPTQ
    with that objective's own Hessian. Methods:

    - ``"epmq"``: that. It is written from E-PMQ's abstract, in its style; ``docs/post-merge.md`` says what is unknown.
    - ``"gptq"``: every target is W_m itself: the same Hessian, rounding alone. With the ``lam`` and ``bias`` of
      ``"epmq"``, the first control.
    - ``"regmean"``: W* without rounding, in full precision: RegMean, with λ = 0. With ``lam``, ``stream`` and
      ``bias`` of ``"epmq"``, the second control. It returns a plain model, BatchNorm folded.
    - ``"hdrq"``, ``"qdrop"``, ``"brecq"``: block reconstruction of that recipe, whose targets are the outputs of the
      experts' blocks, each on its own task. ``distance`` pulls weights towards W_m, for ``"hdrq"``: 0 unless it is
      given, which was best on data apart.
    - ``"awq"``, ``"rtn"``: the merge, quantized by :class:`hdrq.methods.awq.AWQ`, or rounded to nearest.

    Args:
        experts: models of one architecture, in evaluation mode; left as they are.
        calibration: for each expert, data of its task as for :func:`hdrq.quantize`.
        base: the model that they were trained from, for task arithmetic and TIES.
        merge: ``"average"``, ``"task-arithmetic"`` or ``"ties"``.
        method: see above.
        bits: as for :func:`hdrq.quantize`; by default weights alone. What stays in float stays merged.
        group_size: inputs of a linear layer that share a scale; convolutions have one for each output channel, and
            so have linear layers with None.
        lam: λ, as a share of the mean of the diagonal of Σ a_t·X_tᵀX_t; None for 0.01 with ``"epmq"``, else 0.
        weighting: a_t: ``"count"``, 1 over the task's rows, or ``"norm"``, ``1/‖X_tᵀX_t‖_F``.
        stream: whose inputs X_t are: the ``"merged"`` model's, behind all that is finished, or the ``"experts"``' own;
            None for the experts' with ``"regmean"``, else the merged model's.
        bias: ``"solve"`` for biases with the weights, or ``"keep"`` the merge's, and targets leave biases out; None
            solves with ``"epmq"`` and keeps with the others, as GPTQ and RegMean have it.
        merge_options: more fields of :class:`hdrq.merging.float_merges.FloatMerge`.
        held_out, blocks, seed, cache, cache_bytes, offload_folder, progress: as for :func:`hdrq.quantize`.
        workdir, resume, checkpoint_every: as for :func:`hdrq.quantize`: a run that was killed goes on to the same bits.
        knobs: fields of :class:`hdrq.recipes.Recipe`, such as ``damping`` and ``act_order``, or ``iterations`` and
            ``bias_lr`` where blocks are learned.

    Returns:
        A quantized model of the experts' class, as of :func:`hdrq.quantize`; with ``"regmean"`` one in float.
        :func:`hdrq.report.report_of` says for each layer what its objective came to: rounded to nearest, at W*, at the
        end.

    Raises:
        TypeError, ValueError: "X must be …, got …".
        FileExistsError: there is a run in ``workdir``, and ``resume`` is false.

    Source: E-PMQ (arXiv 2605.16882), its abstract alone; RegMean (Jin et al., ICLR 2023); GPTQ; AWQ.
    """
    checks.choice("method", method, METHODS)
    guided = method in LAM
    given = {"lam": lam, "stream": stream, "bias": bias}
    given["weighting"] = None if weighting == "count" else weighting
    unused = [name for name, value in given.items() if value is not None and not guided]
    if unused:
        raise ValueError(f'{unused[0]} must be left out with method="{method}", got {given[unused[0]]!r}')
    lam = checks.real("lam", LAM.get(method, 0.0) if lam is None else lam, 0.0)
    checks.choice("weighting", weighting, WEIGHTINGS)
    bias = checks.choice("bias", bias or ("solve" if method == "epmq" else "keep"), BIASES)
    stream = checks.choice("stream", stream or ("experts" if method == "regmean" else "merged"), STREAMS)
    plan = _plan(method, group_size, knobs)
    seed = checks.integer("seed", seed, 0, 2**63 - 1)
    checks.integer("checkpoint_every", checkpoint_every, 0, 2**31)
    settings = checks.made_of(FloatMerge, {**(merge_options or {}), "merge": merge})
    experts = list(experts)
    for k, expert in enumerate(experts):
        check_module(f"experts[{k}]", expert, bits)
    offload = Offload.of(offload_folder, {f"experts[{k}]": expert for k, expert in enumerate(experts)})
    by_task = calls_of_tasks(experts, calibration)
    checked = None if held_out is None else calibration_calls(held_out, "held_out")
    merged = _merged(experts, base, settings, offload)
    rounds = method != "regmean"
    batches = [call for calls in by_task for call in calls]
    how: dict[str, Any] = {
        "merge": settings.merge,
        "method": method,
        "experts": [state_hash(e.state_dict()) for e in experts],
    }
    how |= {"base": None if base is None else state_hash(base.state_dict())}
    how |= {name: getattr(settings, name) for name in ("scale", "keep", "aggregate", "trim")}
    how |= {"weights": None if settings.weights is None else list(settings.weights)}
    how |= {"lam": lam, "weighting": weighting, "stream": stream, "bias": bias} if guided else {}
    states = {"calibration": data_hash(batches)}
    tasks = {"tasks": [data_hash(calls) for calls in by_task]}  # who is taught by whom
    if workdir is not None:
        check_storable(merged)
    folder = opened(workdir, resume, lambda: fingerprint(merged, {**how, **states, **tasks}, plan, bits, seed, blocks))

    def methods(quantized: nn.Module) -> list[Method]:
        if method == "rtn":
            return []
        if method == "awq":
            return [AWQ(plan, quantized, seed)]
        if method in LEARNED:
            keep = torch.clone if offload is None else offload.put
            anchor = {name: keep(layer.latent.detach()) for name, layer in quantized_layers(quantized).items()}
            return [Reconstruction(part, anchor if plan.needs_source else {}, seed, "auto") for part in plan.walks()]
        if not rounds:
            for layer in quantized_layers(quantized).values():
                layer.weight_quantizer.mode = "float"
        targets = None if method == "gptq" else [_targets(full, quantized, k) for k, full in enumerate(prepared)]
        moments = None if stream == "merged" else _ExpertMoments(prepared, by_task)
        search = partial(search_weight_scale, plan=plan)
        options: dict[str, Any] = {"lam": lam, "weighting": weighting, "solve_bias": bias == "solve"}
        return [
            LayerWise(plan.damping, plan.act_order, spans(by_task), targets, **options, moments=moments,
                      search=search, rounds=rounds)
        ]  # fmt: skip

    prepared: list[nn.Module] = []
    if method in ("epmq", "regmean", *LEARNED) or stream == "experts":
        for k, (expert, calls) in enumerate(zip(experts, by_task, strict=True)):
            run = run_all(calls[:1], f"experts[{k}] must run on calibration[{k}]")
            prepared.append(prepare_float(expert, run, f"experts[{k}]", offload=offload)[0])
    each = -(-max(plan.range_samples, REACHING) // len(by_task))
    quantized, full = fit(
        merged,
        batches,
        checked,
        plan,
        methods,
        RunSettings(seed, cache, cache_bytes, progress, folder, checkpoint_every, offload=offload),
        bits=bits,
        blocks=blocks,
        facts={"post_merge": how, "fingerprints": states},
        reaching=_in_turn([first_samples(calls, each) for calls in by_task]),
        rounds=rounds,
        teachers=[prepared[k] for k, calls in enumerate(by_task) for _ in calls] if method in LEARNED else None,
    )
    return quantized if rounds else _in_float(full, quantized)


def _plan(method: str, group_size: int | None, knobs: Mapping[str, Any]) -> Recipe:
    """The recipe of a method: scales for groups or channels."""
    named = method if method in ("awq", "rtn", *LEARNED) else "gptq"
    if method not in LEARNED and knobs.get("iterations"):
        raise ValueError(f'iterations must be left out with method="{method}", got {knobs["iterations"]}')
    knobs = {"per_channel": True, "group_size": group_size, **knobs}
    if method == "hdrq":
        knobs = {"distance": 0.0, **knobs}
    if method == "regmean":
        knobs |= {"group_size": None, "attention": False}  # nothing is rounded: no grid need fit the weights
    return replace(make_recipe(named, **knobs), name=method)


def calls_of_tasks(experts: Sequence[nn.Module], calibration: Any, what: str = "experts") -> list[list[Call]]:
    """The calls of each task; samples have one shape in all of them."""
    if isinstance(calibration, torch.Tensor | str) or not isinstance(calibration, Sequence):
        raise TypeError(
            f"calibration must be a list of data, one for each of the {what}, got {type(calibration).__name__}"
        )
    if len(calibration) != len(experts):
        raise ValueError(f"calibration must be as many data as the {what}, {len(experts)}, got {len(calibration)}")
    found = []
    for k, (expert, data) in enumerate(zip(experts, calibration, strict=True)):
        found.append(calibration_calls(data, f"calibration[{k}]"))
        check_call(expert, found[-1][0], f"calibration[{k}]")
        shapes = [[tuple(t.shape[1:]) for t in calls[0].tensors] for calls in (found[0], found[-1])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"calibration must have samples of one shape for all tasks, got {shapes[0]} and, in calibration[{k}], "
                f"{shapes[1]}"
            )
    return found


def spans(by_task: Sequence[Sequence[Call]]) -> list[tuple[int, int]]:
    """The first sample of each task, and the one after its last."""
    sizes = [sum(call.size for call in calls) for calls in by_task]
    return [(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))]


def _in_turn(by_task: Sequence[Sequence[Call]]) -> list[Call]:
    """Single samples, one of each task in turn: any number of the first have something of every task."""
    singles = [[call.at(torch.tensor([k])) for call in calls for k in range(call.size)] for calls in by_task]
    longest = max(len(calls) for calls in singles)
    return [calls[k] for k in range(longest) for calls in singles if k < len(calls)]


def _merged(
    experts: Sequence[nn.Module], base: nn.Module | None, settings: FloatMerge, offload: Offload | None
) -> nn.Module:
    options = {name: getattr(settings, name) for name in FloatMerge.__dataclass_fields__}
    tensors = merged_floats(experts, base, **options)
    state = {name: value if offload is None else offload.put(value) for name, value in tensors}
    merged = copy_model("experts[0]", experts[0], offload)
    with torch.no_grad():
        put_state(merged, state)
    return merged


def _targets(full: nn.Module, quantized: nn.Module, number: int) -> dict[str, Target]:
    """What an expert has in the place of each quantized layer."""
    modules, found, wrong = dict(full.named_modules()), {}, []
    for name, layer in quantized_layers(quantized).items():
        own: Any = modules.get(name)
        weight, bias = getattr(own, "weight", None), getattr(own, "bias", None)
        if weight is None or weight.shape != layer.latent.shape or (bias is None) != (layer.module.bias is None):
            wrong.append(name)
        else:
            found[name] = Target(weight.detach(), None if bias is None else bias.detach())
    if wrong:
        raise ValueError(
            f"experts[{number}] must have the layers of the merge once it is folded, got others: {listed(wrong)}"
        )
    return found


class _ExpertMoments:
    """Second moments of what the experts' own layers read, those of one unit at a time."""

    def __init__(self, experts: Sequence[nn.Module], by_task: Sequence[list[Call]]) -> None:
        self.experts, self.by_task = experts, by_task
        self._unit, self._held = -1, [dict[str, Moments]()]

    def __call__(self, unit: Unit, name: str) -> list[Moments] | None:
        if unit.index != self._unit:
            names = [layer.name for layer in unit.layers]
            each = zip(self.experts, self.by_task, strict=True)
            self._unit, self._held = unit.index, [second_moments(expert, calls, names) for expert, calls in each]
        return [held.pop(name) for held in self._held] if all(name in held for held in self._held) else None


@torch.no_grad()
def _in_float(full: nn.Module, fitted: nn.Module) -> nn.Module:
    """The model in full precision with the weights and biases that were fitted in a copy of it."""
    for name, layer in quantized_layers(fitted).items():
        own: Any = full.get_submodule(name)
        own.weight.copy_(layer.latent)
        if own.bias is not None:
            own.bias.copy_(layer.module.bias)
    set_report(full, report_of(fitted))
    return full
