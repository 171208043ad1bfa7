"""Which weights of a folder are quantized, and how: from its config.json and the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hdrq.checkpoint.tensors import Spec
from hdrq.checks import listed
from hdrq.export.folders.forms import Awq, Compressed, Form, Gptq, Read
from hdrq.export.folders.words import words_of

METHODS = ("compressed-tensors", "gptq", "awq")
Config = Mapping[str, Any]


def forms_of(config: Config, specs: Mapping[str, Spec], read: Read) -> dict[str, Form]:
    """The quantized weights of a folder, by the names of their layers.

    Args:
        config: the section of config.json on quantization.
        specs: of all its tensors.
        read: gives one; small ones are read.

    Raises:
        ValueError: the folder is quantized in a way that is not known here, or its tensors are not what it says.
    """
    method = config.get("quant_method")
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"quant_method must be one of {known}, got {method!r}; export that model to one of them")
    found = {"compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}[method](config, specs, read)
    forms = {form.name: form for form in found}
    if not forms:
        raise ValueError(f"the folder must hold weights quantized by {method}, got none")
    return forms


def input_ranges(config: Config, forms: Mapping[str, Form], specs: Mapping[str, Spec], read: Read) -> dict:
    """The range of integers of every layer's input that has a stored scale.

    Raises:
        ValueError: an input is quantized otherwise than with one scale and one zero point.
    """
    ranges = {}
    for name in forms:
        if f"{name}.input_scale" not in specs:
            continue
        scheme = scheme_of(config, name)["input_activations"] or {}
        if specs[f"{name}.input_scale"][1] not in ((1,), ()) or scheme.get("type") != "int":
            raise ValueError(f"{name}.input_scale must be one scale of integers, got {scheme}")
        half = 2 ** (_int(scheme, "num_bits", name) - 1)
        zero = int(read(f"{name}.input_zero_point")) if f"{name}.input_zero_point" in specs else 0
        ranges[name] = (-half - zero, half - 1 - zero)
    return ranges


# --- compressed-tensors


def _compressed(config: Config, specs: Mapping[str, Spec], read: Read) -> Iterator[Form]:
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            why = "rotations learned for one model fit no other" if key == "transform_config" else "it is no weight"
            raise ValueError(f"{key} must be empty to read the folder's integers, got {str(config[key])[:200]}: {why}")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError(f"sparsity_config must be dense, got {config['sparsity_config']}")
    for scale in (name for name in specs if name.endswith(".weight_scale")):
        name = scale.removesuffix(".weight_scale")
        scheme = scheme_of(config, name)
        kind = scheme.get("format") or config.get("format")
        weights = scheme["weights"] or {}
        if kind not in ("pack-quantized", "int-quantized", "naive-quantized") or weights.get("type") != "int":
            raise ValueError(
                f"{name} must be of integers, pack-quantized or int-quantized, got {weights.get('type')} as {kind}"
            )
        if scheme.get("output_activations"):
            raise ValueError(f"{name} must have an output in float, got {scheme['output_activations']}")
        yield _compressed_form(name, weights, specs, read)


def _compressed_form(name: str, weights: Config, specs: Mapping[str, Spec], read: Read) -> Form:
    bits = _int(weights, "num_bits", name)
    tensors = {"scale": f"{name}.weight_scale"}
    padded = False
    if f"{name}.weight_packed" in specs:
        tensors |= {"packed": f"{name}.weight_packed", "shape": f"{name}.weight_shape"}
        _expect(specs, tensors["shape"], (2,))
        outputs, inputs = (int(side) for side in read(tensors["shape"]))
        widths = [words_of(inputs, bits), -(-inputs // (32 // bits))]  # dense, and padded
        _expect(specs, tensors["packed"], *((outputs, width) for width in widths), dtype=torch.int32)
        padded = specs[tensors["packed"]][1] == (outputs, widths[1]) and 32 % bits != 0
        if padded and widths[0] == widths[1]:
            raise ValueError(f"{tensors['packed']} must be wide enough to tell how it is packed, got {inputs} inputs")
    else:
        tensors["weight"] = f"{name}.weight"
        outputs, inputs = _matrix(specs, tensors["weight"], torch.int8)
    affine = not weights.get("symmetric", True)
    if affine:
        tensors["zero_point"] = f"{name}.weight_zero_point"
    group_size, axis = _grid(name, specs, tensors["scale"], (outputs, inputs), weights.get("group_size"))
    if affine:
        _expect(specs, tensors["zero_point"])
    order = None
    if f"{name}.weight_g_idx" in specs:
        tensors["g_idx"] = f"{name}.weight_g_idx"
        order = _order(tensors["g_idx"], read(tensors["g_idx"]), inputs, group_size)
    return Compressed(name, tensors, bits, (outputs, inputs), group_size, axis, affine, order, padded)


def scheme_of(config: Config, name: str) -> dict[str, Any]:
    """What a configuration of compressed-tensors says of a layer: the first group whose target it is; classes last.

    Raises:
        ValueError: no group has it, or the configuration is none.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"config_groups must be groups by name, got {groups!r:.200}")
    empty = {"weights": None, "input_activations": None}
    by_class = None
    for group in groups.values():
        for target in group.get("targets") or []:
            pattern = target.removeprefix("re:")
            if target == name or (pattern != target and re.match(pattern, name)):
                return {**empty, **group}
            if pattern == target and "." not in target and by_class is None:
                by_class = group
    if by_class is None:
        raise ValueError(f"{name} must be a target of config_groups, got none that fits")
    return {**empty, **by_class}


# --- GPTQ and AWQ


def _gptq(config: Config, specs: Mapping[str, Spec], read: Read) -> Iterator[Form]:
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format must be gptq or gptq_v2, got {version!r}; save that model as one of them")
    for words in (name for name in specs if name.endswith(".qweight")):
        name = words.removesuffix(".qweight")
        tensors = {"words": words, "zeros": f"{name}.qzeros", "scale": f"{name}.scales"}
        height, outputs = _matrix(specs, words, torch.int32)
        if f"{name}.g_idx" in specs:
            tensors["g_idx"] = f"{name}.g_idx"
            inputs = specs[tensors["g_idx"]][1][0]
            bits = 32 * height // max(inputs, 1)
        else:
            bits = _int(config, "bits", name)
            inputs = 32 * height // bits
        if bits not in (2, 3, 4, 8) or words_of(inputs, bits) != height or 32 * height % bits:
            raise ValueError(f"{words} must hold 2, 3, 4 or 8 bits for each input, got {height} words for {inputs}")
        group_size, axis = _rows(name, specs, tensors["scale"], (outputs, inputs))
        groups = 1 if group_size is None else inputs // group_size
        _expect(specs, tensors["zeros"], (groups, words_of(outputs, bits)), dtype=torch.int32)
        order = None
        if "g_idx" in tensors:
            order = _order(tensors["g_idx"], read(tensors["g_idx"]), inputs, group_size)
        affine = not config.get("sym", True)
        shape = (outputs, inputs)
        yield Gptq(name, tensors, bits, shape, group_size, axis, affine, order, int(version == "gptq"))


def _awq(config: Config, specs: Mapping[str, Spec], read: Read) -> Iterator[Form]:
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", 4)
    if version != "gemm" or bits != 4 or not config.get("zero_point", True):
        got = f"{version}, {bits} bits, zero_point {config.get('zero_point', True)}"
        raise ValueError(f"an AWQ folder must be of version gemm, 4 bits, with zero points, got {got}")
    for words in (name for name in specs if name.endswith(".qweight")):
        name = words.removesuffix(".qweight")
        tensors = {"words": words, "zeros": f"{name}.qzeros", "scale": f"{name}.scales"}
        inputs, width = _matrix(specs, words, torch.int32)
        group_size, axis = _rows(name, specs, tensors["scale"], (8 * width, inputs))
        _expect(specs, tensors["zeros"], (1 if group_size is None else inputs // group_size, width), dtype=torch.int32)
        yield Awq(name, tensors, bits, (8 * width, inputs), group_size, axis, affine=True)


# --- what all of them share


def _rows(name: str, specs: Mapping[str, Spec], scale: str, shape: tuple[int, int]) -> tuple[int | None, int | None]:
    """The size of groups, or the axis of scales, of scales that lie as (K/g, N)."""
    groups, outputs = _matrix(specs, scale)
    if outputs != shape[0] or groups < 1 or shape[1] % groups:
        raise ValueError(
            f"{scale} must be of groups that divide {shape[1]} inputs, by {shape[0]}, got {specs[scale][1]}"
        )
    return (None, 0) if groups == 1 else (shape[1] // groups, None)


def _grid(
    name: str, specs: Mapping[str, Spec], scale: str, shape: tuple[int, int], group_size: Any
) -> tuple[int | None, int | None]:
    """The size of groups, or the axis of scales, of scales that lie as (N, K/g)."""
    _expect(specs, scale)
    given, (outputs, inputs) = specs[scale][1], shape
    if given in ((), (1,), (1, 1)) and outputs > 1:
        return None, None
    if given in ((outputs,), (outputs, 1)):
        return None, 0
    if len(given) != 2 or given[0] != outputs or inputs % given[1] or group_size != inputs // given[1]:
        raise ValueError(
            f"{scale} must be one scale, one of each output, or of groups of {group_size} that divide the {inputs} "
            f"inputs, got {given} for the weight {shape}"
        )
    return inputs // given[1], None


def _order(name: str, index: torch.Tensor, inputs: int, group_size: int | None) -> torch.Tensor | None:
    """Columns in the order of their groups; None where these are neighbours in order already.

    Raises:
        ValueError: groups are not of one size.
    """
    if index.shape != (inputs,) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be the group of each of {inputs} inputs, got {index.dtype} of {index.shape}")
    size = inputs if group_size is None else group_size
    if bool((index == -1).all()):  # compressed-tensors' for none
        return None
    if not torch.equal(index.long().sort().values, torch.arange(inputs) // size):
        raise ValueError(f"{name} must give every group {size} inputs, got {_counts(index)}")
    order = index.long().argsort(stable=True)
    return None if torch.equal(order, torch.arange(inputs)) else order


def _counts(index: torch.Tensor) -> str:
    """How many inputs groups have, for a message."""
    values, counts = index.unique(return_counts=True)
    return listed(f"{int(c)} in group {int(v)}" for v, c in zip(values, counts, strict=True))


def _matrix(specs: Mapping[str, Spec], name: str, dtype: torch.dtype | None = None) -> tuple[int, int]:
    _expect(specs, name, dtype=dtype)
    shape = specs[name][1]
    if len(shape) != 2:
        raise ValueError(f"{name} must be a matrix, got the shape {shape}")
    return shape[0], shape[1]


def _expect(specs: Mapping[str, Spec], name: str, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if name not in specs:
        raise ValueError(f"the folder must hold {name}, got none")
    got = specs[name]
    if (shapes and got[1] not in shapes) or (dtype is not None and got[0] != dtype):
        wanted = f"{dtype or 'a tensor'}{' of shape ' + ' or '.join(map(str, dict.fromkeys(shapes))) if shapes else ''}"
        raise ValueError(f"{name} must be {wanted}, got {got[0]} of shape {got[1]}")


def _int(config: Config, key: str, name: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise ValueError(f"{key} of {name} must be 2 to 8, got {value!r}")
    return value
