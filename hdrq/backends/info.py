"""What is here: versions, backends, processor and accelerator."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hdrq._version import __version__
from hdrq.backends.dispatch import FAMILIES, available_backends, chosen, of_process

PACKAGES = ("torch", "triton", "numpy", "safetensors")
FEATURES = ("avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")


def facts() -> dict[str, str]:
    """Names and values, in the order in which ``hdrq info`` prints them."""
    result = {"hdrq": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "not installed"
    for name, missing in available_backends().items():
        result[f"backend {name}"] = missing or "available"
    everywhere = of_process()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        by_family = ", ".join(f"{family}: {chosen(family, device)}" for family in FAMILIES)
        result[f"runs on {device}"] = f"{everywhere} (HDRQ_BACKEND)" if everywhere else by_family
    result["processor"] = _processor()
    result["processor features"] = " ".join(_features()) or "none of those looked for"
    if importlib.util.find_spec("hdrq._C"):
        import hdrq._C as _C

        result["vectors in use"] = _C.isa()
    result["threads"] = str(torch.get_num_threads())
    result["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return result


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _features() -> list[str]:
    return [feature for feature in FEATURES if feature in _cpuinfo("flags").split()]
