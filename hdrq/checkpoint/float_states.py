"""States in full precision, in files of any kind, and the models that are made of them."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdrq.checkpoint.architecture import build, name_of
from hdrq.checkpoint.deferred import built_on_meta, give_parameters
from hdrq.checkpoint.library import load_file
from hdrq.checkpoint.states import put_state, state_differences, tensors_of
from hdrq.checks import listed
from hdrq.errors import MissingExtra
from hdrq.prepare.offload import Offload

PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile
IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_float(
    model: str | Callable[..., nn.Module],
    weights: str | os.PathLike | None = None,
    model_args: Mapping[str, Any] | None = None,
    *,
    offload_folder: str | os.PathLike | None = None,
) -> nn.Module:
    """A model in full precision, in evaluation mode: an architecture with a state from a file.

    Args:
        model: the architecture: ``"module:factory"``, ``"timm:NAME"``, ``"torchvision:NAME"``, or a function that
            returns it.
        weights: its state: a safetensors file, a ``.pth`` of tensors, an index of shards, or a folder that holds one of
            these, as Hugging Face's do. None for what the function gives.
        model_args: the function's arguments.
        offload_folder: a folder on a disk. The model is made without memory for its parameters, and they stay in the
            files of ``weights``, from which the system reads what is used: only what has another dtype there than in
            the architecture is copied, to a file in this folder. The files of ``weights`` must not change while the
            model lives: a process ends when a file that it has mapped is cut short. None reads all into memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such architecture; a file that is no state, or not the architecture's: the tensors are named.
        TypeError: ``model`` makes something else than a module.
    """
    known = name_of(model)
    if offload_folder is None:
        made = build(model, **(model_args or {}))
        if weights is not None:
            put_state(made, _state_for(made, known, weights))
        return made.eval()
    if weights is None:
        raise ValueError("weights must be a file where offload_folder is given, got None")
    offload = Offload(offload_folder)
    made = built_on_meta(model, **(model_args or {}))
    state = _state_for(made, known, weights, mapped=True)

    def place(name: str, parameter: nn.Parameter) -> torch.Tensor:
        value = state[name]
        return value if value.dtype == parameter.dtype else offload.put(value.to(parameter.dtype))

    given = give_parameters(made, place)
    put_state(made, {name: value for name, value in state.items() if name not in given})
    return made.eval()


def _state_for(
    model: nn.Module, known: str, weights: str | os.PathLike, mapped: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a model, ``known`` by a name, from a file that has them all, and nothing that is no model's."""
    wanted = tensors_of(model)
    state = _without_prefix(read_state(weights, mapped), wanted, weights)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = {id(parameter): name for name, parameter in parameters.items() if name in state}
    for name, parameter in parameters.items():
        if name not in state and id(parameter) in given:  # a tied one is saved once
            state[name] = state[given[id(parameter)]]
    for name in wanted.keys() - state.keys():
        if name.rpartition(".")[2] == "num_batches_tracked":
            state[name] = wanted[name]  # decides nothing in evaluation
    for name in state.keys() - wanted.keys():
        if name.rpartition(".")[2] in ("total_ops", "total_params"):
            del state[name]  # counters that a profiler left
    differences = state_differences(state, wanted, dtypes=False)
    if differences and any(name.endswith(".weight.codes") for name in state):
        raise ValueError(f"{weights} must have the tensors of {known}, got codes: that model is quantized already")
    if differences:
        raise ValueError(f"{weights} must have the tensors of {known}, got {listed(differences)}")
    return state


def read_state(path: str | os.PathLike, mapped: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a state: of one file, of an index of shards, or of a folder that holds either.

    Of a ``.bin``, ``.pt`` or ``.pth`` file tensors alone are read, ``torch.load(weights_only=True)``: no code is run.
    Those are mapped where ``mapped``; tensors of safetensors files always are.

    Raises:
        FileNotFoundError: no such file; a shard that the index names is missing.
        ValueError: it is no state; the file is named.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not found:
            raise ValueError(f"weights must be a file, or a folder with {' or '.join(IN_FOLDER)}, got {path}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file that exists, got {path}")
    try:
        if path.suffix == ".json":
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = {str(name) for name in names.values()}
            outside = sorted(name for name in shards if Path(name).name != name)
            if outside:
                raise ValueError(f"shards must lie beside the index, got {listed(outside)}")
            parts = [read_state(path.parent / name, mapped) for name in sorted(shards)]
            state = {name: value for part in parts for name, value in part.items()}
            missing = sorted(names.keys() - state.keys())
            if missing:
                raise ValueError(f"its shards must hold all that it names, got none for {listed(missing)}")
            return state
        if path.suffix in (".bin", ".pt", ".pth"):
            if mapped and not zipfile.is_zipfile(path):
                raise ValueError(
                    "it has torch's format of before 1.6, which cannot be mapped; save it anew, torch.save(torch.load("
                    "path, weights_only=True), path), or leave offload_folder out"
                )
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
                held = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
                raise ValueError(f"it must be a state dict of tensors, and holds {held[:200]}")
            return dict(state)
        return load_file(path)
    except (FileNotFoundError, MissingExtra):
        raise
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds more than tensors, which is not read because a pickle can run code"
        raise ValueError(
            f"weights must be a safetensors file, a state dict or an index, got {path}: {reason}"
        ) from error


def _without_prefix(state: dict[str, torch.Tensor], wanted: Mapping, path) -> dict[str, torch.Tensor]:
    """A state whose names do not begin with what a wrapper put before all of them; a warning says so."""
    for _ in range(4):
        for prefix in PREFIXES:
            own = any(name.startswith(prefix) for name in wanted)
            if state and not own and all(name.startswith(prefix) for name in state):
                warnings.warn(f"{path} has the prefix {prefix!r} before every name: it is taken off", stacklevel=3)
                state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
