"""A program of :func:`hdrq.export.pt2` as machine code of this processor, through AOTInductor and oneDNN."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from hdrq.calibrate.data import Call
from hdrq.errors import MissingExtra
from hdrq.export.onnx_qdq import require
from hdrq.export.pt2e import WEIGHT, float_products, layer_of

CONFIG = {"freezing": True, "cpp.dynamic_threads": True}
INTEGER_PRODUCTS = ("onednn::qconv", "onednn::qlinear")


class Compiled:
    """A compiled program. It is called as the model was, with a batch of any size, and returns what that returned.

    Raises:
        TypeError, ValueError: "X must be …, got …": arguments are not those that the program was made for. The machine
            code itself would read whatever lies there.
    """

    def __init__(self, program: ExportedProgram, run: Callable) -> None:
        if program.example_inputs is None:
            raise ValueError("program must have its example inputs, got none")
        self._example, self._run = Call(*program.example_inputs), run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        example, call = self._example, Call(args, kwargs)
        if len(args) != len(example.args) or kwargs.keys() != example.kwargs.keys():
            raise TypeError(f"arguments must be as in ({example}), got ({call})")
        pairs = [*zip(args, example.args, strict=True), *((kwargs[key], example.kwargs[key]) for key in kwargs)]
        if not call.size or not all(_alike(given, wanted, call.size, example.size) for given, wanted in pairs):
            raise ValueError(f"arguments must be as in ({example}), with a batch of any size, on the CPU, got ({call})")
        args = tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in args)
        kwargs = {key: x.contiguous() if isinstance(x, torch.Tensor) else x for key, x in kwargs.items()}
        return self._run(*args, **kwargs)


def _alike(given: Any, wanted: Any, size: int, batch: int) -> bool:
    """Whether an argument is of the kind that is wanted, with ``size`` samples in the place of ``batch``."""
    if not isinstance(wanted, torch.Tensor):
        return type(given) is type(wanted) and given == wanted
    if not isinstance(given, torch.Tensor) or (given.dtype, given.device) != (wanted.dtype, wanted.device):
        return False
    shape = tuple(wanted.shape)
    return tuple(given.shape) == ((size, *shape[1:]) if shape and shape[0] == batch else shape)


def compile_pt2(program: ExportedProgram | str | os.PathLike) -> Compiled:
    """Compile a program, once for every size of the batch, to integer kernels of oneDNN where its products have them.

    Inductor's patterns of torchao are registered, and weights are frozen: packed for the kernels once. Both decide
    whether a product is one of integers, which :func:`hdrq.export.check` proves. The code is for this processor.

    Args:
        program: of :func:`hdrq.export.pt2`, or the file of one.

    Raises:
        TypeError, ValueError: it is no program of ``torch.export``.
        MissingExtra: torchao is not installed, ``pip install "hdrq[pt2]"``, or there is no C++ compiler.
    """
    return _compiled(opened(program))


@torch.no_grad()  # weights are frozen nowhere else
def _compiled(program: ExportedProgram, **config: Any) -> Compiled:
    _register_patterns()
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import InvalidCxxCompiler

    with tempfile.TemporaryDirectory() as folder:
        package = os.fspath(Path(folder) / "model.pt2")
        try:
            aoti_compile_and_package(program, package_path=package, inductor_configs={**CONFIG, **config})
        except InvalidCxxCompiler as error:
            raise MissingExtra("a C++ compiler must be installed, such as g++, got none") from error
        return Compiled(program, aoti_load_package(package))


def opened(program: ExportedProgram | str | os.PathLike) -> ExportedProgram:
    """A program, read from its file where a path is given.

    Raises:
        TypeError: it is neither.
        ValueError: the file is none of ``torch.export.save``.
    """
    if isinstance(program, ExportedProgram):
        return program
    if not isinstance(program, str | os.PathLike):
        raise TypeError(f"program must be one of torch.export or its file, got {type(program).__name__}")
    try:
        return torch.export.load(program)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"program must be a file of torch.export.save, got {os.fspath(program)}: {reason}; "
            "classes that the model returns must be imported before"
        ) from error


def count_products(program: ExportedProgram) -> tuple[Compiled, int, list[str]]:
    """A compiled program, how many products are kernels of integers, and those of quantized weights that are not."""
    found: dict[str, Any] = {"integer": 0, "floats": []}

    def see(graph: Any) -> None:
        for node in graph.nodes:
            name = str(getattr(node.target, "_schema", None) and node.target._schema.name)
            found["integer"] += name.startswith(INTEGER_PRODUCTS) and "prepack" not in name
            if node.target is WEIGHT:  # it is gone where a kernel reads the codes
                codes = node.args[0]
                while codes.op == "call_function":
                    codes = codes.args[0]
                found["floats"].append(layer_of(codes.target))

    compiled = _compiled(program, post_grad_custom_pre_pass=see)  # where it has chosen kernels
    return compiled, found["integer"], [*found["floats"], *float_products(program)]


def _register_patterns() -> None:
    """Make torchao's patterns of x86 known to inductor, and nothing else: the module sets an option of inductor too."""
    require("torchao", extra="pt2")
    from torch._inductor import config

    own = config.pre_grad_custom_pass
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer  # noqa: F401

    config.pre_grad_custom_pass = own
