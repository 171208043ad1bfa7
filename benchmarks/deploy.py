"""``hdrq bench deploy``: float and exported quantized models in ONNX Runtime, OpenVINO and inductor, and here, batch 1
and 32.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hdrq
from hdrq import tree
from hdrq.backends.info import facts
from hdrq.benchmarks.harness import Mismatch, pinned
from hdrq.calibrate.data import Call, calibration_calls
from hdrq.demo.model import load_model
from hdrq.export import check, compile_pt2, deploy, to_onnx, to_pt2
from hdrq.export.graph import free_batch


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


def forms_of(name: str, samples: int, folder: Path) -> tuple[dict[str, Callable[[Call], Any]], Call, dict[str, int]]:
    """Each form of a model as a function of a call, a call of so many samples, and the bytes of what holds the model.

    Raises:
        Mismatch: a file computes a quantized layer in float, or the deploy form has other answers.
    """
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    data = inputs(samples)
    quantized = hdrq.quantize(model, data, "rtn", bits="W8A8", per_channel=True, progress=False)
    call = calibration_calls(data)[0]
    deployed = deploy(quantized)
    if not all(map(torch.equal, _tensors(call(deployed)), _tensors(call(quantized)))):
        raise Mismatch(f"{name}: the deploy form has other answers")
    paths = {form: folder / form for form in ("float.onnx", "onnxruntime.onnx", "openvino.onnx", "inductor.pt2")}
    program = _export_float(model, call, paths["float.onnx"])
    to_pt2(quantized, data, paths["inductor.pt2"], allow_float=True)
    for runtime in ("onnxruntime", "openvino"):
        to_onnx(quantized, data, paths[f"{runtime}.onnx"], runtime=runtime, data=data, allow_float=True)
    for path in list(paths.values())[1:]:
        found = check(path, quantized, data, runtime=path.stem)
        if found.floats:
            raise Mismatch(f"{name} in {path.stem}: {found}")
    forms = {
        "PyTorch, float": lambda call: call(model),
        "hdrq, eager": lambda call: call(quantized),
        "hdrq, deploy form": lambda call: call(deployed),
        "ONNX Runtime, float": _onnxruntime(paths["float.onnx"]),
        "ONNX Runtime, integers": _onnxruntime(paths["onnxruntime.onnx"]),
        "OpenVINO, float": _openvino(paths["float.onnx"]),
        "OpenVINO, integers": _openvino(paths["openvino.onnx"]),
        "inductor, float": _inductor(program),
        "inductor, integers": _inductor(paths["inductor.pt2"]),
    }
    sizes = {path.name: path.stat().st_size for path in paths.values()}
    return forms, call, {**sizes, "quantized": _held(quantized), "deploy form": _held(deployed)}


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [x for x in tree.leaves(outputs) if isinstance(x, torch.Tensor)]


def _held(model: nn.Module) -> int:
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _export_float(model: nn.Module, call: Call, path: Path) -> torch.export.ExportedProgram:
    args, kwargs, shapes = free_batch(model, call)
    torch.onnx.export(
        model, args, path, kwargs=kwargs, dynamo=True, opset_version=21, verbose=False, dynamic_shapes=shapes,
        external_data=False,
    )  # fmt: skip
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _onnxruntime(path: Path) -> Callable[[Call], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda call: session.run(None, dict(zip(names, (t.numpy() for t in call.tensors), strict=True)))


def _openvino(path: Path) -> Callable[[Call], Any]:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(
        os.fspath(path), "CPU", {**hints, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    return lambda call: compiled([tensor.numpy() for tensor in call.tensors])


def _inductor(program: torch.export.ExportedProgram | Path) -> Callable[[Call], Any]:
    compiled = compile_pt2(program)
    return lambda call: compiled(*call.args, **call.kwargs)


@torch.no_grad()
def measure(calls: dict[str, Callable], seconds: float) -> dict[str, float]:
    """The fifth part of each call's milliseconds that is fastest ends here, the calls taking turns.

    On a machine that others use too, most calls of some milliseconds are interrupted, and medians are of the others.
    """
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
    return {name: statistics.quantiles(found, n=5)[0] for name, found in times.items()}


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
        with pinned(options.threads), tempfile.TemporaryDirectory() as folder:
            try:
                forms, call, sizes = forms_of(name, max(*options.batch, 8), Path(folder))
            except Mismatch as failure:
                print(f"\nverification failed: {failure}")
                status = 1
                continue
            print(f"\n{name}: {', '.join(f'{what} {size / 2**20:.2f} MiB' for what, size in sizes.items())}")
            for batch in options.batch:
                part = call.at(torch.arange(batch))
                found = measure({form: partial(run, part) for form, run in forms.items()}, options.seconds)
                print(f"\n{name}, batch {batch}, {options.threads} thread{'s' * (options.threads > 1)}")
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
    versions = {name: __import__(name).__version__ for name in ("onnx", "onnxruntime", "openvino", "torchao")}
    record = {"title": "a call, milliseconds", **facts(), **versions, "figures": records}
    (folder / "deploy-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
