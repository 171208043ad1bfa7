"""LoRA adapters in the layout that peft writes: a config in JSON, and two factors for each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch

from hdrq import checks
from hdrq.merging.weights import Plain, Product, Rows, Weights, weight_name

CONFIG = "adapter_config.json"
IN_FOLDER = ("adapter_model.safetensors", "adapter_model.bin")
FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?P<rest>\..+)?"
)
# Of a config: what is read here, and what says how an adapter was trained, not what it adds. peft 0.21 writes these.
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
}
INERT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "eva_config", "qalora_group_size", "lora_bias", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# How factors start; those that are not here change the weights beside them too.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
WAY_OUT = (
    "merge it into its float model with peft (merge_and_unload), save both, and give the merged model as the change, "
    "minus the other"
)


@dataclass
class Module:
    """What an adapter has for one module."""

    factors: dict[str, torch.Tensor] = field(default_factory=dict)  # A and B
    bias: torch.Tensor | None = None
    embedding: bool = False


def adapter_files(path: Path) -> tuple[Path, Path | None] | None:
    """The tensors and the config of a path that may be an adapter; None where it is a folder that is none."""
    if not path.is_dir():
        config = path.parent / CONFIG
        return path, config if config.is_file() else None
    if not (path / CONFIG).is_file():
        return None
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name, path / CONFIG
    raise ValueError(f"adapter must hold {' or '.join(IN_FOLDER)} beside {CONFIG}, got none in {path}")


def is_adapter(names: Any) -> bool:
    """Whether names of tensors are those of an adapter."""
    return any(".lora_" in name for name in names)


def adapter_changes(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    alpha: float | None,
    base: Weights,
    label: str,
) -> dict[str, Rows]:
    """What an adapter adds to each tensor of a model: ``(alpha/r)·B·A``, with rank-stabilized LoRA ``(alpha/√r)·B·A``.

    B·A is transposed where a weight has its inputs along its first axis: of embeddings, and of ``Conv1D`` of
    transformers. A convolution's B has a window of one element.

    Args:
        config: what ``adapter_config.json`` says; None where there is none, then ``alpha`` must be given.
        label: of the adapter, for messages.

    Raises:
        TypeError, ValueError: the adapter does more than add to weights, or a layer of it is not in the model.

    Source: Hu et al., "LoRA", ICLR 2022; Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023; peft's layout.
    """
    settings = _settings(config, alpha, label)
    modules = _modules(tensors, label)
    names = {weight_name(module) for module in modules}
    names |= {f"{module}.bias" for module, has in modules.items() if has.bias is not None}
    missing = sorted(name for name in names if name not in base.specs)
    if missing:
        raise ValueError(
            f"{label} must be for layers of the model, got {checks.listed(missing)}, which it does not have; it has "
            f"{checks.listed(list(base.specs)[:4])}"
        )
    turned = _turned(modules, bool(settings.get("fan_in_fan_out")), base, label)
    changes: dict[str, Rows] = {}
    for module, has in modules.items():
        scale, a, b = _scale(settings, module, has, label), has.factors["A"], has.factors["B"]
        factors = (a.T, b.T) if turned[module] else (b.flatten(1), a.flatten(1))
        changes[weight_name(module)] = Product(*factors, scale)
        if has.bias is not None:
            changes[f"{module}.bias"] = Plain(has.bias.double() * scale)
    return changes


def _settings(config: Mapping[str, Any] | None, alpha: float | None, label: str) -> Mapping[str, Any]:
    """A config that adds to weights and does nothing else."""
    if config is None:
        if alpha is None:
            raise ValueError(
                f"alpha must be given for {label}, which has no {CONFIG} beside it: an adapter adds alpha/r times its "
                "factors' product; got None"
            )
        return {"lora_alpha": checks.real("alpha", alpha)}
    if alpha is not None:
        raise ValueError(f"alpha must be left out for {label}, whose {CONFIG} has it, got {alpha}; scale= is free")
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f'peft_type of {label} must be "LORA", got {kind!r}; {WAY_OUT}')
    if start not in STARTS:
        raise ValueError(
            f"init_lora_weights of {label} must be one that leaves the model's weights as they are, got {start!r}: "
            "what it adds counts from other weights; save it with peft's path_initial_model_for_weight_conversion, or "
            f"{WAY_OUT}"
        )
    more = [
        f"{key}={value!r:.60}" for key, value in config.items() if key not in READ | INERT and _says_more(key, value)
    ]
    if more:
        raise ValueError(f"{label} must add to weights and do nothing else, got {checks.listed(more)}; {WAY_OUT}")
    return config


def _says_more(key: str, value: Any) -> bool:
    return bool(value) and not (key == "bias" and value == "none")


def _modules(tensors: Mapping[str, torch.Tensor], label: str) -> dict[str, Module]:
    modules: dict[str, Module] = {}
    adapters, strange = set(), []
    for key, value in tensors.items():
        found = FACTOR.fullmatch(key)
        rest = (found["rest"] or "") if found else ""
        embedding = bool(found and found["embedding"])
        ending = "" if embedding else next((end for end in (".weight", ".bias") if rest.endswith(end)), None)
        if found is None or ending is None or (ending == ".bias" and found["factor"] == "A"):
            strange.append(key)
            continue
        adapters.add(rest.removesuffix(ending))
        module = modules.setdefault(found["module"], Module(embedding=embedding))
        checks.tensor(f"{key} of {label}", value, (*checks.FLOATS, torch.float64))
        checks.finite(f"{key} of {label}", value)
        if ending == ".bias":
            module.bias = value
        else:
            module.factors[found["factor"]] = value
    # peft saves the weight of an embedding that it adapts too; it is the model's own.
    strange = [key for key in strange if not (key.endswith(".base_layer.weight") and _module_of(key) in modules)]
    if strange or len(adapters) > 1:
        several = f"factors of {len(adapters)} adapters, {checks.listed(sorted(adapters))}"
        raise ValueError(
            f"{label} must hold lora_A and lora_B of one adapter and nothing else, got "
            f"{checks.listed(strange) if strange else several}; {WAY_OUT}"
        )
    halves = [name for name, module in modules.items() if len(module.factors) < 2]
    if halves:
        raise ValueError(f"{label} must hold lora_A and lora_B of every layer, got one for {checks.listed(halves)}")
    return modules


def _module_of(key: str) -> str:
    return key.removeprefix("base_model.model.").removesuffix(".base_layer.weight")


def _scale(settings: Mapping[str, Any], module: str, has: Module, label: str) -> float:
    """alpha/r, or alpha/√r; a pattern is for the modules whose name, or whose end after a point, it matches."""

    def pattern(key: str, default: Any) -> Any:
        for pattern, value in (settings.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    rank = has.factors["A"].shape[0]
    said = pattern("rank_pattern", settings.get("r", rank))
    if said != rank:
        raise ValueError(f"lora_A of {module} must have the rank that {label} says, {said}, got {rank}")
    alpha = checks.real(f"alpha of {module} in {label}", pattern("alpha_pattern", settings.get("lora_alpha")))
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def _turned(modules: Mapping[str, Module], fan_in_fan_out: bool, base: Weights, label: str) -> dict[str, bool]:
    """Whether each weight has its inputs along its first axis, so that it takes the transposed product.

    The shape says it, where it is not square; then the layer, where it is known. The config does not: peft sets
    fan_in_fan_out for all layers where some are ``Conv1D``. Without any such layer none is turned.
    """
    turned: dict[str, bool] = {}
    square: list[str] = []
    for module, has in modules.items():
        name, a, b = weight_name(module), has.factors["A"], has.factors["B"]
        shape = base.specs[name][1]
        fits = a.ndim >= 2 and b.ndim >= 2 and prod(b.shape[2:]) == 1 and a.shape[0] == b.shape[1]
        product = (b.shape[0], *a.shape[1:]) if fits else ()
        ways = {way for way, made in ((False, product), (True, product[::-1])) if made == shape}
        if has.embedding or len(shape) != 2:
            ways &= {has.embedding}
        if not ways:
            raise ValueError(
                f"lora_A and lora_B of {label} must make a change of {name}, {shape}, got {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            )
        if len(ways) == 2 and (axis := base.output_axis(name)) is not None:
            ways = {axis % 2 == 1}
        if len(ways) == 2:
            square.append(module)
        else:
            (turned[module],) = ways
    linear = [way for module, way in turned.items() if len(base.specs[weight_name(module)][1]) == 2]
    embeddings = sum(has.embedding for has in modules.values())
    if square and (fan_in_fan_out or sum(linear) > embeddings):
        raise ValueError(
            f"model must be given for {label}, got none: layers of it have their inputs along the first axis, and "
            f"of {checks.listed(square)}, which are square, the file does not say it"
        )
    return turned | dict.fromkeys(square, False)
