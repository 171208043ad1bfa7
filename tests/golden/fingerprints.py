"""Golden fingerprints of whole runs: a refactoring that changes one bit of a code, scale or bias changes one of these.

``python tests/golden/fingerprints.py`` takes them for the processor and the torch that it runs on, beside those of
others. Convolutions and matrix products sum in an order of the processor's, so elsewhere there is nothing to compare
with. A change that is meant to move bits takes them anew on one processor and deletes the others'.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

import hdrq

STORED = Path(__file__).parent / "fingerprints.json"
ITERATIONS = 12


def environment() -> str:
    """What decides the order of sums: the processor, its vectors, and torch."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = {line for line in _cpuinfo() if line.startswith("model name")}
    processor = min(names).partition(":")[2].strip() if names else platform.processor()
    return f"{processor}, {capability}, torch {torch.__version__}"


def stored() -> dict[str, dict[str, str]]:
    """The fingerprint of every run, by the environment that it was taken in."""
    return json.loads(STORED.read_text())


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tensors_of(path: Path) -> str:
    """A SHA-256 of the names, types and bytes of every tensor of a checkpoint; its manifest may say more each year."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            value = file.get_tensor(name)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def saved(model: nn.Module) -> str:
    """The fingerprint of the file of a quantized model."""
    with tempfile.TemporaryDirectory() as folder:
        hdrq.save(model, Path(folder) / "model.safetensors")
        return tensors_of(Path(folder) / "model.safetensors")


def _demo(domain: str, recipe: str, preset: str = "paper", **options) -> nn.Module:
    from hdrq.demo.data import load
    from hdrq.demo.model import load_model

    source = load_model("source") if recipe == "hdrq" else None
    images = load(domain, "train")[0][:96]
    steps = 0 if recipe == "rtn" else ITERATIONS
    options = {"bits": "W3A3", "weight_lr": 1e-4 if preset == "official" else 1e-3, **options}
    return hdrq.quantize(load_model(domain), images, recipe, preset=preset, source=source, iterations=steps, **options)


def _resumed() -> nn.Module:
    """A run that is killed in its third block, and goes on."""
    with tempfile.TemporaryDirectory() as folder:

        def kill(step) -> None:
            if step.index == 2:
                raise KeyboardInterrupt

        try:
            _demo("mnist", "hdrq", workdir=folder, checkpoint_every=4, progress=kill)
        except KeyboardInterrupt:
            return _demo("mnist", "hdrq", workdir=folder, checkpoint_every=4, resume=True)
    raise AssertionError("the run must have been killed, got to its end")


def _merged_files() -> str:
    from hdrq.merging.files import merge_files

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for domain in ("mnist", "optdigits"):
            files.append(folder / f"{domain}.safetensors")
            hdrq.save(_demo(domain, "rtn"), files[-1])
        merge_files(files, folder / "merged.safetensors", draws=4, seed=1)
        return tensors_of(folder / "merged.safetensors")


def _architecture(name: str) -> nn.Module:
    from architectures import built

    model, data = built(name)
    return hdrq.quantize(model, data, "hdrq", bits="W4A4", iterations=6, weight_lr=1e-3, distance=0.0, batch_size=4)


RUNS: dict[str, Callable[[], nn.Module | str]] = {
    "demo rtn": lambda: _demo("mnist", "rtn"),
    "demo brecq": lambda: _demo("mnist", "brecq"),
    "demo qdrop": lambda: _demo("mnist", "qdrop"),
    "demo hdrq paper": lambda: _demo("mnist", "hdrq"),
    "demo hdrq official": lambda: _demo("mnist", "hdrq", "official"),
    "demo hdrq resumed": _resumed,
    "demo merged": lambda: hdrq.merge([_demo("mnist", "rtn"), _demo("photos", "rtn")], draws=4, seed=1),
    "demo merged files": _merged_files,
    "ViT hdrq": lambda: _architecture("ViT"),
    "U-Net hdrq": lambda: _architecture("U-Net"),
}


@one_thread()
def fingerprint(name: str) -> str:
    """That of one of :data:`RUNS`."""
    result = RUNS[name]()
    return result if isinstance(result, str) else saved(result)


def main() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    found = {name: fingerprint(name) for name in RUNS}
    STORED.write_text(json.dumps({**stored(), environment(): found}, indent=2) + "\n")
    print(STORED.read_text())


if __name__ == "__main__":
    main()
