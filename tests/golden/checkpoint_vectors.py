"""The test vectors of docs/checkpoint.md: a small file with every form that codes, scales and zero points have.

``python tests/golden/checkpoint_vectors.py`` writes it again; the same content gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hdrq.checkpoint.format import Writer
from hdrq.ops import pack

FILE = Path(__file__).parent / "checkpoint.safetensors"
CODES = {
    "signed4": torch.tensor([[-8, -7, -1, 0, 1], [2, 3, 4, 5, 6], [7, 7, -8, 0, -1]], dtype=torch.int8),
    "unsigned3": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]], dtype=torch.int8),
    "signed8": torch.tensor([[-128, -1, 0], [1, 64, 127]], dtype=torch.int8),
    "unsigned8": torch.tensor([0, 1, 128, 255], dtype=torch.int16),
    "signed12": torch.tensor([[-2048, 2047], [-1, 1]], dtype=torch.int16),
    "grouped4": torch.tensor([[-8, -4, 0, 4, 1, 2, 3, 7], [0, 1, 0, -1, -2, 5, 6, -3]], dtype=torch.int8),
}
SCALES = {
    "signed4": [0.5],
    "unsigned3": [0.25, 0.1],
    "signed8": [0.01, 1.5],
    "unsigned8": [2.0],
    "signed12": [1e-3, 3e-4],
    "grouped4": [[0.5, 0.25], [1.0, 0.125]],
}
ZERO_POINTS = {"unsigned3": [3, 0], "unsigned8": [128], "grouped4": [[1, 0], [-2, 7]]}
MANIFEST: dict[str, Any] = {
    "hdrq": "0.2.0",
    "contract": 2,
    "weights": {
        "signed4": {"range": [-8, 7], "axis": None, "shape": [3, 5]},
        "unsigned3": {"range": [0, 7], "axis": 0, "shape": [2, 4], "affine": True},
        "signed8": {"range": [-128, 127], "axis": 0, "shape": [2, 3]},
        "unsigned8": {"range": [0, 255], "axis": None, "shape": [4], "affine": True},
        "signed12": {"range": [-2048, 2047], "axis": -1, "shape": [2, 2]},
        "grouped4": {"range": [-8, 7], "axis": None, "shape": [2, 8], "affine": True, "group_size": 4},
    },
    "tied": {"again": "signed4"},
    "inputs": {"signed4": [0, 15], "signed8": [-3, 12]},
    "shared": {"unsigned3": "signed4"},
    "folded": {"norm": "signed4"},
    "attention": {},
}
PACKED = ("signed4", "unsigned3", "grouped4")


def tensors() -> dict[str, torch.Tensor]:
    found = {f"{name}.weight.codes": pack(codes) if name in PACKED else codes for name, codes in CODES.items()}
    found |= {f"{name}.weight.scale": torch.tensor(scale) for name, scale in SCALES.items()}
    found |= {f"{name}.weight.zero_point": torch.tensor(z, dtype=torch.int32) for name, z in ZERO_POINTS.items()}
    found |= {f"{name}.input.scale": torch.tensor([scale]) for name, scale in (("signed4", 0.125), ("signed8", 0.75))}
    return found | {"signed4.bias": torch.tensor([0.0, -1.5, 3.25]), "steps": torch.tensor(7)}


def write(path: Path = FILE) -> None:
    values = tensors()
    with Writer(path, {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}, MANIFEST) as file:
        for name, value in values.items():
            file.write(name, value)


if __name__ == "__main__":
    write()
