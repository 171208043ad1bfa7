"""Checkpoints of a run: what is finished, and how far the block in work has come. Never a pickle.

A work folder holds ``run.json`` (what the run is made of, its fingerprint, and the bits that it found under a budget),
``block-000.safetensors`` and so on (what each finished block learned), ``current.safetensors`` (parameters, Adam's
moments and the iteration of the block in work) and ``losses.csv``. Every file is replaced at once, so a kill leaves a
state from which the run goes on. Batches, noise and schedules are functions of seed and iteration and need no file;
what finished blocks return is computed again, by the same calls, to the same bits. Each file of tensors carries a hash
of its content, so that a flipped bit is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdrq._version import __version__
from hdrq.checkpoint.files import csv_text, output_folder, write_atomically
from hdrq.checkpoint.library import SafetensorError, check_installed, safe_open, save
from hdrq.checks import differing, listed
from hdrq.quantizers.bits import recorded
from hdrq.recipes import Recipe
from hdrq.rng import CONTRACT

CURRENT = "current.safetensors"
RUN = "run.json"
CHOSEN = "chosen bits"  # what the run found under the budget that it began with: it is kept, and not compared
THREADS = "threads"  # of torch: a run may go on with others, and is told what that does
LOSSES = ("block", "iteration", "loss")


class Workdir:
    """The folder of one run.

    Args:
        path: of the folder, which is made if it is missing.
        fingerprint: what the run is made of.
        resume: whether to go on with the run that is there; if there is none, one starts.

    Raises:
        FileExistsError: there is a run, and ``resume`` is false.
        ValueError: there is a run of another fingerprint; the message says what differs.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: Mapping[str, Any], resume: bool) -> None:
        begun = begun_run(path, fingerprint, resume)
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        if begun is None:
            write_atomically(self.path / RUN, _text({**fingerprint, THREADS: threads}))
        elif begun.get(THREADS, threads) != threads:
            warnings.warn(
                f"the run in {path} began with {begun[THREADS]} threads and goes on with {threads}: it sums in another "
                f"order, so its bits will be others; OMP_NUM_THREADS={begun[THREADS]} keeps them",
                stacklevel=3,
            )

    def save_block(self, index: int, tensors: Mapping[str, torch.Tensor], facts: dict) -> None:
        """A finished block: what it learned. It is no longer in work."""
        self._save(_block(index), tensors, facts)
        (self.path / CURRENT).unlink(missing_ok=True)

    def load_block(self, index: int) -> tuple[dict[str, torch.Tensor], dict] | None:
        return self._load(_block(index))

    def save_current(self, tensors: Mapping[str, torch.Tensor], facts: dict) -> None:
        """The block in work."""
        self._save(CURRENT, tensors, facts)

    def load_current(self, index: int) -> tuple[dict[str, torch.Tensor], dict] | None:
        """The state of the block in work, if it is block ``index``."""
        state = self._load(CURRENT)
        return state if state is not None and state[1]["index"] == index else None

    def write_losses(self, rows: list[tuple]) -> None:
        """``losses.csv``: block, iteration, loss."""
        records = [dict(zip(LOSSES, row, strict=True)) for row in rows]
        write_atomically(self.path / "losses.csv", csv_text(records, LOSSES))

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: dict) -> None:
        copies = {key: value.detach().cpu().clone() for key, value in tensors.items()}
        text = json.dumps(facts)
        write_atomically(self.path / name, save(copies, {"hdrq": text, "sha256": _file_hash(copies, text)}))

    def _load(self, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
                text = metadata["hdrq"]
                if _file_hash(tensors, text) != metadata.get("sha256"):
                    raise ValueError("its content has another hash than it was written with")
                return tensors, json.loads(text)
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            way_out = "delete that file, and what it held is learned again"
            raise ValueError(f"workdir must hold checkpoints of hdrq, got {path}: {error}; {way_out}") from error


def begun_run(path: str | os.PathLike, fingerprint: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """What the run in a work folder began with, if there is one and it may go on; nothing is written.

    Raises:
        MissingExtra: safetensors is not installed.
        FileExistsError: there is a run, and ``resume`` is false.
        ValueError: there is a run of another fingerprint; the message says what differs.
    """
    check_installed()
    folder = output_folder(path, "workdir")
    if not (folder / RUN).exists():
        return None
    if not resume:
        raise FileExistsError(f"workdir must hold no run, or resume=True go on with it, got one in {folder}")
    before, now = _read_run(folder / RUN), json.loads(_text(fingerprint))
    names = [name for name in differing(before, now) if name not in (CHOSEN, THREADS)]
    if names:
        changed = [f"{name} ({before.get(name)}, now {now.get(name)})" for name in names]
        raise ValueError(f"resume must have what the run in {folder} began with, got others: {listed(changed)}")
    return before


def _text(fingerprint: Mapping[str, Any]) -> str:
    return json.dumps(fingerprint, indent=1, sort_keys=True, default=str)


def _read_run(path: Path) -> dict[str, Any]:
    """What a run began with."""
    try:
        run = json.loads(path.read_text())
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"workdir must hold a run of hdrq, got {path} that is not JSON: {error}") from error
    if not isinstance(run, dict):
        raise ValueError(f"workdir must hold a run of hdrq, got {path} with a {type(run).__name__} in it")
    return run


def _file_hash(tensors: Mapping[str, torch.Tensor], facts: str) -> str:
    """The fingerprint that a checkpoint carries of itself: of its tensors, in the order of names, and its facts."""
    return state_hash({name: tensors[name] for name in sorted(tensors)}, facts)


def _block(index: int) -> str:
    return f"block-{index:03}.safetensors"


def opened(path: str | os.PathLike | None, resume: bool, run: Callable[[], Mapping[str, Any]]) -> Workdir | None:
    """The folder of a run; None where none is asked for.

    Args:
        run: gives the fingerprint.

    Raises:
        FileExistsError, ValueError: see :class:`Workdir`; a run is to be resumed, and no folder is given.
    """
    if path is not None:
        return Workdir(path, run(), resume)
    if resume:
        raise ValueError("workdir must be the folder of the run to resume, got None")
    return None


def fingerprint(
    model: nn.Module,
    states: Mapping[str, Any],
    plan: Recipe,
    bits: Any,
    seed: int,
    blocks: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Everything that decides the bits of a run, as text that can be compared.

    Args:
        states: hashes of ``"model"`` and ``"calibration"``, and of ``"source"`` where there is one; or what else stands
            for the model, such as those that it is merged of.
    """
    return {
        **surroundings(model, seed, blocks),
        "bits": recorded(bits),
        "source": None,
        **states,
        **{f"recipe.{key}": value for key, value in asdict(plan).items()},
    }


def surroundings(model: nn.Module, seed: int, blocks: Sequence[str] | None) -> dict[str, Any]:
    """What decides the bits of any run beside its model, its data and its method."""
    devices = (v.device.type for v in model.state_dict().values() if isinstance(v, torch.Tensor))
    return {
        "hdrq": __version__,
        "contract": CONTRACT,
        "torch": torch.__version__,
        "device": next(devices, "cpu"),
        "seed": seed,
        "blocks": blocks if blocks is None else list(blocks),
    }


def state_hash(state: Mapping[str, Any], more: str = "") -> str:
    """A fingerprint of a state dict: 16 hexadecimal digits of a SHA-256 of its names and values.

    Extra state of modules may be any object: numbers, texts and tensors in it count, other objects by their type.
    """
    digest = hashlib.sha256(more.encode())
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            value = value.to_dense() if value.layout != torch.strided else value
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping | list | tuple):
            inside = value if isinstance(value, Mapping) else dict(enumerate(value))
            digest.update(state_hash({f"{name}[{key!r}]": part for key, part in inside.items()}).encode())
        else:
            plain = isinstance(value, str | bytes | int | float | complex | None.__class__)
            text = f"{name} {value!r}" if plain else f"{name} {type(value).__name__}"
            digest.update(text.encode())
    return digest.hexdigest()[:16]
