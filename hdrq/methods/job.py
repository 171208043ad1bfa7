"""What the command line and its YAML files say, carried out: quantizing a model, evaluating one."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from hdrq import checks, recipes
from hdrq.calibrate.cache import check_cache
from hdrq.calibrate.data import calibration_calls, run_all
from hdrq.calibrate.images import MEAN, STD, image_reader, load_data
from hdrq.calibrate.progress import Step
from hdrq.calibrate.ranks import Ranks
from hdrq.calibrate.report import RunReport, report_of
from hdrq.checkpoint.files import check_room, output_folder, output_path, write_atomically
from hdrq.checkpoint.float_states import load_float
from hdrq.checkpoint.loading import float_dtype
from hdrq.checkpoint.saving import check_storable, save_or_keep
from hdrq.checkpoint.workdir import begun_run
from hdrq.methods.post_merge import METHODS, post_merge
from hdrq.methods.post_training import check_options, quantize
from hdrq.methods.read_yaml import parse_yaml, path_of, yaml_of
from hdrq.methods.sensitivity import Sensitivity, sensitivity
from hdrq.prepare.float_model import check_module
from hdrq.quantizers.bits import check_bits
from hdrq.quantizers.provenance import origin, set_origin

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PLACES = ("out", "weights", "source", "offload_folder", "workdir")
TEXTS = {"model", "data", "recipe", "preset", "device", "cache", *PLACES}
# What the manifest has of a run, beside the recipe, bits, seed and architecture that every one has.
RECORDED = ("preset", "samples", "held_out", "resize", "crop", "mean", "std", "device")
UNKEPT = "out is not given, nor workdir: of the quantized model the table is all that stays"
ABLATION = {
    "as given": {},
    "no distance": {"distance": 0.0},
    "nor noise": {"distance": 0.0, "fake_quant_fraction": 1.0},
}


@dataclass(frozen=True)
class Run:
    """Every setting of ``hdrq quantize``, with its default. Those that are not here are fields of the recipe."""

    model: str  # "module:factory"; the factory takes model_args and returns the architecture
    data: str  # a folder of images, or a .npy or .safetensors file
    out: str | None = None  # the quantized model, safetensors
    weights: str | None = None  # the model's state, safetensors; None for the factory's own
    source: str | None = None  # the state of the model before its adaptation
    model_args: dict = field(default_factory=dict)
    recipe: str = "hdrq"
    preset: str = "paper"
    bits: str | dict = "W4A4"
    seed: int = 0
    samples: int | None = 1024  # of data, at most; None for all
    held_out: float = 0.1  # share of the samples that nothing is learned from: the report's errors are taken on them
    resize: int = 256
    crop: int = 224
    mean: tuple = MEAN
    std: tuple = STD
    device: str = "cpu"
    cache: str = "auto"
    cache_bytes: int | None = None
    graph: bool | str = "auto"
    offload_folder: str | None = None  # where weights lie instead of memory
    workdir: str | None = None  # checkpoints, losses, their plot
    resume: bool = False
    checkpoint_every: int = 1000
    statistics: bool | int = False  # keep what layers read beside the codes: all of it, or a sketch of this rank
    knobs: dict = field(default_factory=dict)  # any field of hdrq.recipes.Recipe

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Run:
        """From names and values, those of the recipe's fields among them.

        Raises:
            ValueError: a name that is none; no model or no data.
        """
        odd = [repr(name)[:50] for name in settings if not isinstance(name, str)]
        if odd:
            raise ValueError(f"names of settings must be strings, got {checks.listed(odd)}")
        own = {f.name for f in fields(cls)}
        knobs = {f.name for f in fields(recipes.Recipe)} - {"name"}
        spelt = once([(name.replace("-", "_"), value) for name, value in settings.items()], "settings")
        given = recipes.current_names(spelt)
        for name in given:
            checks.choice("setting", name, tuple(sorted(own | knobs)))
        for name in ("model", "data"):
            if not given.get(name):
                raise ValueError(f"{name} must be given, got none")
        for name in TEXTS & given.keys():
            if not isinstance(given[name], str | None.__class__):
                raise TypeError(f"{name} must be a string, got {type(given[name]).__name__}")
        for name in {"data", *PLACES} & given.keys():
            given[name] = given[name] and path_of(given[name])
        for name in ("model_args", "knobs"):
            if not isinstance(given.get(name, {}), dict) or not all(isinstance(k, str) for k in given.get(name, {})):
                raise TypeError(f"{name} must be a mapping from names, got {given[name]!r:.100}")
        if not isinstance(given.get("resume", False), bool):
            raise TypeError(f"resume must be true or false, got {given['resume']!r:.100}")
        pairs = [*given.pop("knobs", {}).items(), *((name, given.pop(name)) for name in knobs & given.keys())]
        return cls(**given, knobs=once(pairs, "settings and knobs"))


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings of a YAML file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"config must be a file of settings, got {path}, which is none")
    try:
        settings = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"config must be YAML, got {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config must be a mapping of settings, got {type(settings).__name__} in {path}")
    return settings


def write_settings(run: Run, path: str | os.PathLike) -> None:
    """Write every setting of a run, its recipe's knobs among them, to a YAML file that :func:`read_settings` reads.

    Raises:
        ValueError: a setting that the run would refuse.
        OSError: the file cannot be written.
    """
    plan = asdict(recipes.recipe(run.recipe, run.preset, **run.knobs))
    settings = {name: value for name, value in asdict(run).items() if name not in ("knobs", "resume")}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    del plan["name"]
    text = yaml_of({**{k: v for k, v in settings.items() if v is not None}, **plan})
    write_atomically(output_path(path, "save_config"), text)


def parse_setting(text: str) -> tuple[str, Any]:
    """``"name=value"``, the value as YAML has it: ``"warmup=0.2"``."""

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"set must be name=value, got {text!r}")
    try:
        return name, parse_yaml(value)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"set must have a value of YAML, got {text[:100]!r}: {error}") from error


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Several of :func:`parse_setting`, under names with underscores.

    Raises:
        ValueError: a name comes twice.
    """
    return once([(name.replace("-", "_"), value) for name, value in map(parse_setting, texts)], "set")


def once(pairs: Sequence[tuple[str, Any]], what: str) -> dict[str, Any]:
    """Names and values as a dict.

    Raises:
        ValueError: a name comes twice; it begins with ``what``.
    """
    counts = Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{what} must give each name once, got more of {checks.listed(twice)}")
    return dict(pairs)


def options_of(texts: Sequence[str], *kinds: type) -> dict[str, Any]:
    """:func:`parse_settings`, which must be fields of one of the dataclasses ``kinds``."""
    known = sorted({f.name for kind in kinds for f in fields(kind)} - {"name", "method"})
    options = parse_settings(texts)
    for name in options:
        checks.choice("set", name, tuple(known))
    return options


def check(run: Run) -> None:
    """Refuse at once what :func:`execute` would refuse later: settings, files, and a model that does not run.

    Of the data one sample is read, which the model runs on.

    Raises:
        TypeError, ValueError, OSError: "X must be …, got …".
    """
    plan = _settings(run)
    source, options = run.source, (run.workdir, run.resume, run.checkpoint_every, run.statistics)
    check_options(plan, source, run.seed, run.graph, *options)
    if run.workdir is not None:
        output_folder(run.workdir, "workdir")
        if not run.resume:
            begun_run(run.workdir, {}, resume=False)
    _, model, _, sample, _ = _prepare(replace(run, samples=1))
    check_module("model", model, run.bits)
    run_all(calibration_calls(sample), "model must run on calibration")(model)


def check_apart(runs: Mapping[str, Run]) -> None:
    """Refuse runs, by name, of which one writes what another writes or reads, or nothing."""
    writers: dict[str, str] = {}
    for name, run in runs.items():
        if run.out is None:
            raise ValueError(f"out must be given for each of several runs, got none for {name}")
        for what, path in (("out", run.out), ("workdir", run.workdir)):
            other = writers.setdefault(os.path.realpath(path), name) if path is not None else name
            if other != name:
                raise ValueError(f"{what} must be another for each run, got {path!r} for {other} and for {name}")
    for name, run in runs.items():
        for what, path in (("weights", run.weights), ("source", run.source), ("data", run.data)):
            writer = name if path is None else writers.get(os.path.realpath(path), name)
            if writer != name:
                raise ValueError(f"{what} of {name} must be there before the runs, got {path!r}, which {writer} writes")


def execute(
    run: Run, progress: Callable[[Step], None] | bool = True, process_group: ProcessGroup | None = None
) -> nn.Module:
    """Load, quantize, save. The manifest of the result has every setting that decides its bits, given or not.

    Paths are left out: the same run gives the same file, wherever it lies. Fingerprints say what was read. Every rank
    of a process group loads for itself; rank 0 alone saves.
    """
    ranks = Ranks.of(process_group)
    with ranks.together():
        plan, model, source, samples, held_out = _prepare(run if ranks.first else replace(run, out=None))
        if run.out is None and run.workdir is None and plan.iterations and ranks.first:
            warnings.warn(UNKEPT, stacklevel=2)
        quantized = quantize(
            model,
            samples,
            plan,
            bits=run.bits,
            source=source,
            seed=run.seed,
            held_out=held_out,
            cache=run.cache,
            cache_bytes=run.cache_bytes,
            graph=run.graph,
            offload_folder=run.offload_folder,
            workdir=run.workdir,
            resume=run.resume,
            checkpoint_every=run.checkpoint_every,
            statistics=run.statistics,
            progress=progress,
            process_group=process_group,
        )
        architecture = {"factory": run.model, "arguments": run.model_args}
        settings = {name: getattr(run, name) for name in RECORDED}
        set_origin(quantized, {**origin(quantized), "architecture": architecture, "run": settings})
        if run.out is not None and ranks.first:
            save_or_keep(quantized, run.out)
    return quantized


def measure_sensitivity(
    run: Run, samples: int = 128, progress: Callable[[int, int, str], None] | None = None
) -> Sensitivity:
    """:func:`hdrq.sensitivity` of the model and the data of a run, whose ``bits`` must ask for a budget."""
    plan, model, _, data, _ = _prepare(replace(run, source=None, out=None))
    return sensitivity(model, data, plan, bits=run.bits, samples=samples, progress=progress)


def post_merge_files(
    paths: Sequence[str | os.PathLike],
    data: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    model: str,
    model_args: Mapping[str, Any] | None = None,
    base: str | os.PathLike | None = None,
    samples: int | None = 256,
    resize: int = 256,
    crop: int = 224,
    method: str = "epmq",
    offload_folder: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
    **options: Any,
) -> nn.Module:
    """:func:`post_merge` of experts in files, into a file that :func:`hdrq.load` reads.

    Args:
        paths: the experts' states, each a path that :func:`hdrq.checkpoint.float_states.read_state` reads.
        data: for each expert, a path that :func:`hdrq.calibrate.images.load_data` reads.
        out: the quantized model.
        model: the architecture, ``"module:factory"``; ``model_args`` are the factory's.
        base: the state that the experts were trained from.
        samples: of each task, at most; None for all. ``resize`` and ``crop`` are for images.
        offload_folder: of :func:`post_merge`; the experts stay in their files (:func:`hdrq.load_float`).
        method, options: of :func:`post_merge`, but ``"regmean"``, whose result is not quantized.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …".
        OSError: ``out`` cannot be written.
    """
    checks.choice("method", method, tuple(name for name in METHODS if name != "regmean"))
    output_path(out)
    if samples is not None:
        checks.integer("samples", samples, 1, 2**31)
    if len(data) != len(paths):
        raise ValueError(f"data must be as many as the experts, {len(paths)}, got {len(data)}")
    arguments = dict(model_args or {})
    read = partial(load_float, model, model_args=arguments, offload_folder=offload_folder)
    experts = [read(path) for path in paths]
    origin_model = None if base is None else read(base)
    if experts:
        check_storable(experts[0])
    calibration = [load_data(path, resize=resize, crop=crop, limit=samples) for path in data]
    calibration = [x.to(float_dtype(expert)) for x, expert in zip(calibration, experts, strict=True)]
    options |= {"method": method, "checkpoint_every": checkpoint_every, "offload_folder": offload_folder}
    result = post_merge(experts, calibration, origin_model, **options)
    run = {"samples": samples, "resize": resize, "crop": crop}
    set_origin(result, {**origin(result), "architecture": {"factory": model, "arguments": arguments}, "run": run})
    save_or_keep(result, out)
    return result


def ablate(
    run: Run, progress: Callable[[Step], None] | bool = True, process_group: ProcessGroup | None = None
) -> dict[str, RunReport]:
    """The run as it is given, without distance, and without distance and noise: what each of them is worth.

    In ``workdir`` each has a folder of its own, to be resumed from.

    Raises:
        ValueError: the recipe has neither; and as :func:`execute`.
    """
    plan = _settings(run)
    if not plan.iterations or plan.learns != "weights":
        raise ValueError(f"recipe must learn weights to be ablated, with distance or noise, got {run.recipe!r}")
    reports = {}
    for name, knobs in ABLATION.items():
        place = None if run.workdir is None else os.path.join(run.workdir, name.replace(" ", "-"))
        settings = {**asdict(run), "knobs": {**run.knobs, **knobs}, "workdir": place}
        if knobs:
            settings |= {"out": None}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", re.escape(UNKEPT))  # a table is what is asked for
            reports[name] = report_of(execute(Run(**settings), progress, process_group))
    return reports


def _least(model: nn.Module) -> int:
    """Bytes that a quantized model's file cannot be smaller than: matrices have 2 bits for each weight at least."""
    return sum(t.numel() // 4 if t.ndim > 1 else t.nbytes for t in model.state_dict().values() if torch.is_tensor(t))


def _settings(run: Run) -> recipes.Recipe:
    """The recipe, once the settings are checked that need neither the model nor the data."""
    plan = recipes.recipe(run.recipe, run.preset, **run.knobs)
    check_bits(run.bits)
    check_cache(run.cache, run.cache_bytes)
    image_reader(run.resize, run.crop, run.mean, run.std)  # refuses what is wrong, images or not
    if run.source is not None and not os.path.exists(run.source):
        raise FileNotFoundError(f"source must be a state that exists, got {run.source!r}")
    if run.out is not None:
        output_path(run.out)
    checks.real("held_out", run.held_out, 0.0, 0.5)
    checks.device(run.device)
    if run.samples is not None:
        checks.integer("samples", run.samples, 1, 2**31)
    return plan


def _prepare(run: Run):
    plan = _settings(run)
    model = load_float(run.model, run.weights, run.model_args, offload_folder=run.offload_folder).to(run.device)
    if run.out is not None:
        check_storable(model)
        check_room(run.out, _least(model))
    source = None
    if run.source is not None and plan.iterations > 0:
        source = load_float(run.model, run.source, run.model_args, offload_folder=run.offload_folder).to(run.device)
    data = load_data(run.data, resize=run.resize, crop=run.crop, mean=run.mean, std=run.std, limit=run.samples)
    data = data.to(float_dtype(model))
    shares = torch.arange(len(data) + 1, dtype=torch.float64) * run.held_out
    held = (shares + 1e-6).floor().diff() > 0  # evenly over all; a product may fall short of its integer
    return plan, model, source, data[~held], data[held] if held.any() else None
