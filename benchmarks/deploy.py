"""``hdrq bench deploy``: float and exported quantized models in ONNX Runtime and OpenVINO, and here, batch 1 and 32.

The demo's ResNet with its weights, and a ResNet-18, a ViT-S/16 and a BERT of transformers with random ones, whose speed
is that of trained ones. W8A8, weights per channel, rounded to nearest. Every file is run and compared before it is
timed; providers take turns.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hdrq
from hdrq.backends.info import facts
from hdrq.benchmarks.harness import Mismatch, pinned
from hdrq.calibrate.data import Call, calibration_calls
from hdrq.demo.model import load_model
from hdrq.export import check, to_onnx


def resnet18() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    return ResNetForImageClassification(config)


def vit_small() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**sizes))


def bert_mini() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 4}
    return BertForSequenceClassification(BertConfig(**sizes))


def images(side: int) -> Callable[[int], Any]:
    return lambda n: torch.randn(n, 3, side, side)


def sentences(n: int) -> Any:
    return [{"input_ids": torch.randint(1000, (n, 128)), "attention_mask": torch.ones(n, 128, dtype=torch.int64)}]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "demo ResNet": (lambda: load_model("mnist"), images(32)),
    "ResNet-18": (resnet18, images(224)),
    "ViT-S/16": (vit_small, images(224)),
    "BERT, 4 layers of 256": (bert_mini, sentences),
}


def providers(name: str, batch: int, folder: Path) -> tuple[dict[str, Callable], dict[str, int]]:
    """A call of each form of a model, and the bytes of its file.

    Raises:
        Mismatch: a file computes a quantized layer in float, or other answers.
    """
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    data = inputs(max(batch, 8))
    quantized = hdrq.quantize(model, data, "rtn", bits="W8A8", per_channel=True, progress=False)
    call = calibration_calls(data)[0].at(torch.arange(batch))
    paths = {"float": folder / "float.onnx"}
    _export_float(model, calibration_calls(data)[0], paths["float"])
    calls = {"PyTorch, float": lambda: call(model), "hdrq, eager": lambda: call(quantized)}
    for runtime in ("onnxruntime", "openvino"):
        paths[runtime] = folder / f"{runtime}.onnx"
        to_onnx(quantized, data, paths[runtime], runtime=runtime, data=data, allow_float=True)
        found = check(paths[runtime], quantized, data, runtime=runtime)
        if found.floats:
            raise Mismatch(f"{name} in {runtime}: {found}")
    calls["ONNX Runtime, float"] = _onnxruntime(paths["float"], call)
    calls["ONNX Runtime, integers"] = _onnxruntime(paths["onnxruntime"], call)
    calls["OpenVINO, float"] = _openvino(paths["float"], call)
    calls["OpenVINO, integers"] = _openvino(paths["openvino"], call)
    return calls, {form: path.stat().st_size for form, path in paths.items()}


def _export_float(model: nn.Module, call: Call, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=2**20)
    shapes: Any = tuple({0: batch} for _ in call.args) or {key: {0: batch} for key in call.kwargs}
    torch.onnx.export(
        model, call.args, path, kwargs=dict(call.kwargs), dynamo=True, opset_version=21, verbose=False,
        dynamic_shapes=shapes, external_data=False,
    )  # fmt: skip


def _onnxruntime(path: Path, call: Call) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    feed = dict(zip((i.name for i in session.get_inputs()), (t.numpy() for t in call.tensors), strict=True))
    return lambda: session.run(None, feed)


def _openvino(path: Path, call: Call) -> Callable:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(
        os.fspath(path), "CPU", {**hints, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    tensors = [tensor.numpy() for tensor in call.tensors]
    return lambda: compiled(tensors)


@torch.no_grad()
def measure(calls: dict[str, Callable], seconds: float) -> dict[str, float]:
    """The median of each call's milliseconds, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["hdrq, eager"]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main(arguments: list[str] | None = None, prog: str = "python -m hdrq.benchmarks deploy") -> int:
    """Export, check, time, print and write: 0, or 1 if a file was not what it should be, which is not timed."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model and batch")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write figures (CSV, JSON) there")
    options = parser.parse_args(arguments)
    records: list[dict] = []
    status = 0
    for name in options.models:
        for batch in options.batch:
            with pinned(options.threads), tempfile.TemporaryDirectory() as folder:
                try:
                    calls, sizes = providers(name, batch, Path(folder))
                except Mismatch as failure:
                    print(f"\nverification failed: {failure}")
                    status = 1
                    continue
                found = measure(calls, options.seconds)
            print(f"\n{name}, batch {batch}, {options.threads} thread{'s' * (options.threads > 1)}")
            print(f"files: {', '.join(f'{form} {size / 2**20:.2f} MiB' for form, size in sizes.items())}")
            for form, milliseconds in found.items():
                ratio = found["ONNX Runtime, float"] / milliseconds
                print(f"{form:26}{milliseconds:10.2f} ms{ratio:8.2f} times ONNX Runtime's float", flush=True)
                records.append(
                    {"model": name, "batch": batch, "threads": options.threads, "form": form, "ms": milliseconds}
                    | {"over_float": ratio}
                )
    if options.out is not None and records:
        _write(records, options.out)
    return status


def _write(records: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "deploy-cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    versions = {name: __import__(name).__version__ for name in ("onnx", "onnxruntime", "openvino")}
    record = {"title": "a call, milliseconds", **facts(), **versions, "figures": records}
    (folder / "deploy-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
