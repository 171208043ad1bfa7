"""What a run needs of memory: ``python -m hdrq.benchmarks.memory --out NAME``.

A chain of residual blocks, each of two linear layers, is written to a file, read by :func:`hdrq.load_float`, quantized
by a recipe and saved, each way in a process of its own; ``load`` reads a quantized model, runs it and saves it, and
``merge`` merges two of them whose blocks learn. What is told is the peak of its anonymous memory (``RssAnon`` of
Linux, every 5 ms) above that before the model was read, in units of the model's bytes. Anonymous memory is what a
system cannot take back: pages of mapped files it drops, or writes out, and reads again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import hdrq
from hdrq.backends.info import facts
from hdrq.methods.calibrated_merge import merge_calibrated

STATUS = Path("/proc/self/status")
WAYS = ("memory", "offload_folder")


class Block(nn.Module):
    """``x + W₂·relu(W₁·x)``, the inner width four times the outer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def network(width: int, blocks: int) -> nn.Module:
    return nn.Sequential(*[Block(width) for _ in range(blocks)])


class Peak:
    """The most anonymous memory that this process has, in bytes, since it was asked for the first time."""

    def __init__(self) -> None:
        self.first = self.most = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _now() -> int:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) << 10

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, self._now())
            time.sleep(0.005)


def measured(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Make and save a model in this process: the peak of its memory over the model's bytes, and the time it took."""
    offload = {"offload_folder": folder / "offload"} if options.way == "offload_folder" else {}
    x = torch.randn(options.samples, options.width, generator=torch.Generator().manual_seed(0))
    peak, began = Peak(), time.perf_counter()
    result = {"load": loaded, "merge": merged}.get(options.run, quantized)(options, folder, x, offload)
    hdrq.save(result, folder / f"{options.way}.safetensors")
    size = sum(tensor.nbytes for name, tensor in result.state_dict().items() if name.endswith(("original", "bias")))
    return {"peak": (peak.most - peak.first) / size, "seconds": time.perf_counter() - began}


def quantized(options: argparse.Namespace, folder: Path, x: torch.Tensor, offload: dict[str, Path]) -> nn.Module:
    files = folder / "source.safetensors", folder / "weights.safetensors"
    source, model = (hdrq.load_float(network, f, options.shape, **offload) for f in files)
    knobs: dict[str, Any] = {"source": source} if options.run == "hdrq" else {}
    knobs |= {} if options.run in ("rtn", "gptq") else {"iterations": options.iterations}
    return hdrq.quantize(model, x, options.run, bits=options.bits, cache="disk", progress=False, **knobs, **offload)


def loaded(options: argparse.Namespace, folder: Path, x: torch.Tensor, offload: dict[str, Path]) -> nn.Module:
    model = hdrq.load(folder / "0.safetensors", network, options.shape, **offload)
    with torch.no_grad():
        model(x)
    return model


def merged(options: argparse.Namespace, folder: Path, x: torch.Tensor, offload: dict[str, Path]) -> nn.Module:
    files, made = [folder / f"{k}.safetensors" for k in (0, 1)], partial(network, **options.shape)
    how = {"method": "hdrq", "iterations": options.iterations, "cache": "disk", "progress": False}
    return merge_calibrated(files, [x, -x], architecture=made, **how, **offload)


def main(arguments: list[str] | None = None) -> int:
    """Every run, in both ways; 1 if these did not make the same file."""
    parser = argparse.ArgumentParser(prog="python -m hdrq.benchmarks.memory", description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--bits", default="W4A8")
    parser.add_argument("--runs", default="rtn,gptq,qdrop,hdrq,load,merge", help="recipes, load and merge")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk; the system's for temporary files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.shape = {"width": options.width, "blocks": options.blocks}
    if options.way:
        print(json.dumps(measured(options, options.folder)))
        return 0
    told = {k: v for k, v in vars(options).items() if k not in ("folder", "out", "run", "way", "shape")}
    found: dict[str, Any] = {"machine": facts(), "options": told, "runs": {}}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        file = write_inputs(options, folder)
        print(f"a model of {os.path.getsize(file) / 2**20:,.0f} MiB; peaks of anonymous memory in its size")
        for run in options.runs.split(","):
            runs = {way: _measured_apart(options, run, way, folder) for way in WAYS}
            same = len({(folder / f"{way}.safetensors").read_bytes() for way in WAYS}) == 1
            found["runs"][run] = {**runs, "same": same}
            said = "; ".join(f"{way} {each['peak']:.2f} ({each['seconds']:.0f} s)" for way, each in runs.items())
            print(f"{run}: {said}; {'the same file' if same else 'OTHER FILES'}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(each["same"] for each in found["runs"].values()) else 1


def write_inputs(options: argparse.Namespace, folder: Path) -> Path:
    """Write two networks in full precision, and quantized if a run wants these; one of the former."""
    for k, file in enumerate(folder / name for name in ("source.safetensors", "weights.safetensors")):
        torch.manual_seed(k)
        save_file(network(**options.shape).state_dict(), file)
        if {"load", "merge"} & set(options.runs.split(",")):
            model, x = hdrq.load_float(network, file, options.shape), torch.randn(options.samples, options.width)
            hdrq.save(hdrq.quantize(model, x, "rtn", bits=options.bits, progress=False), folder / f"{k}.safetensors")
    return file


def _measured_apart(options: argparse.Namespace, run: str, way: str, folder: Path) -> dict[str, float]:
    given = {"width": options.width, "blocks": options.blocks, "samples": options.samples}
    given |= {"iterations": options.iterations, "bits": options.bits, "run": run, "way": way, "folder": folder}
    command = [sys.executable, "-W", "ignore", "-m", "hdrq.benchmarks.memory"]
    command += [text for key, value in given.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run} with {way} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    raise SystemExit(main())
