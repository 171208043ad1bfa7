"""Quantized models of others as files of hdrq, and files of hdrq in their form again: which kind a model is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hdrq.export.folders import is_folder, read_folder, write_folder

KNOWN = "an ONNX model (.onnx), or a folder of transformers with its config.json"


def read(path: str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
    """Write a quantized model that others made as a file of hdrq, so that it can be merged on its integers.

    The kind is known by the name: ``.onnx`` for :func:`read_onnx`; a folder with ``config.json`` for
    :func:`read_folder` (compressed-tensors, GPTQ and AWQ).

    Returns:
        The file's manifest, whose ``origin`` says what it was.

    Raises:
        FileNotFoundError: no such file.
        ValueError: of no kind that is read, or damaged; the message names the file.
        MissingExtra: what reads it is not installed.
    """
    _check_kind("path", path)
    if is_folder(path):
        return read_folder(path, out)
    from hdrq.export.onnx_import import read_onnx

    return read_onnx(path, out)


def write_like(file: str | os.PathLike, template: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write a file of hdrq in the form of the model that it was read from, or that one of its parents was read from.

    A folder is the template's with other numbers in its shards, in its words and dtypes. A graph is the template's too:
    codes, scales and zero points of weights; scales, zero points and Clips of activations; int32 biases in steps
    ``s_x·s_w`` of the new scales; every other float. What is equal stays as it is, byte for byte, so that what was read
    and is written again is the same model. External data of ONNX goes to a file beside ``out`` with ``.data`` after its
    name. The metadata says how the numbers were made.

    Args:
        file: what :func:`read` wrote, or a merge of such files.
        template: a model that :func:`read` reads.
        out: the model, which appears whole or not at all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not of the template's graph, or its numbers do not fit its types; the message names what
            differs.
        MissingExtra: what writes it is not installed.
    """
    _check_kind("template", template)
    if is_folder(template):
        write_folder(file, template, out)
        return
    from hdrq.export.onnx_qdq import require

    require("onnx")
    from hdrq.export.onnx_like import write_onnx

    write_onnx(file, template, out)


def _check_kind(name: str, path: str | os.PathLike) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name} must be a model that exists, got {os.fspath(path)!r}")
    if not (is_folder(path) or os.fspath(path).endswith(".onnx")):
        raise ValueError(f"{name} must be {KNOWN}, got {os.fspath(path)!r}")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Raise any error about a file's content as a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a damaged file raises anything in what reads it
        ours = isinstance(error, ValueError | TypeError) and str(error)
        reason = str(error) if ours else f"model must be a sound one, got {type(error).__name__}: {error}"
        raise ValueError(f"{path}: {reason}") from error
