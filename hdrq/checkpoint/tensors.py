"""Safetensors files read one tensor at a time; what a header claims is checked against the file first."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod

import torch

from hdrq.checkpoint.library import safe_open

LONGEST_HEADER = 100_000_000  # bytes, in any reader of safetensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Spec = tuple[torch.dtype, tuple[int, ...]]


class TensorFile:
    """A safetensors file. ``specs`` has the dtype and shape of every tensor, ``metadata`` the texts beside them.

    Raises:
        FileNotFoundError: no such file.
        ValueError, safetensors.SafetensorError: it is damaged, cut short, or holds a dtype that torch has not.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        with safe_open(path, framework="pt") as mapped:  # checks the header against the file
            self.metadata: dict[str, str] = mapped.metadata() or {}
            slices = {name: mapped.get_slice(name) for name in mapped.keys()}  # noqa: SIM118
            self.specs: dict[str, Spec] = {
                n: (_dtype(n, s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()
            }
        # What is mapped ends the process where another shortens the file, so tensors are read.
        self._file = open(path, "rb")  # noqa: SIM115
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        self.places = {name: 8 + length + header[name]["data_offsets"][0] for name in self.specs}

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own.

        Raises:
            ValueError: the file was cut short meanwhile.
        """
        dtype, shape = self.specs[name]
        value = torch.empty(shape, dtype=dtype)
        self._file.seek(self.places[name])
        if value.numel() and self._file.readinto(as_bytes(value)) != value.nbytes:
            raise ValueError(f"tensor {name} ends before its last byte")
        return value


def places_of(specs: Mapping[str, Spec]) -> dict[str, tuple[int, int]]:
    """Where tensors lie behind a header, one after another in the order given: its first byte, its end."""
    places, end = {}, 0
    for name, (dtype, shape) in specs.items():
        places[name] = (end, end := end + prod(shape) * dtype.itemsize)
    return places


def header(specs: Mapping[str, Spec], places: Mapping[str, tuple[int, int]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with."""
    entries: dict[str, object] = {"__metadata__": metadata}
    for name, (dtype, shape) in specs.items():
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": places[name]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(value: torch.Tensor):
    """A dense tensor of a CPU as bytes, in its own memory."""
    return value.reshape(-1).view(torch.uint8).numpy().data


def _dtype(name: str, text: str) -> torch.dtype:
    if text not in DTYPES:
        raise ValueError(f"{name} must be of {', '.join(DTYPES)}, got {text}")
    return DTYPES[text]
