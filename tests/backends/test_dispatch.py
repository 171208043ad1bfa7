"""Which backends there are: a Triton that is too old counts as missing, and says so."""

import importlib
import importlib.util
import sys

import pytest

import hdrq
from hdrq.backends import dispatch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize(("version", "missing"), [("3.2.0", True), ("3.6.0", False), ("10.0.1+git1", False)])
def test_a_triton_that_is_too_old_is_missing(version, missing, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(dispatch, "_interpreting", lambda: True)
    monkeypatch.setattr(hdrq, "kernels", importlib.import_module("hdrq.kernels"))  # importing it again replaces both
    monkeypatch.delitem(sys.modules, "hdrq.kernels")
    why = dispatch._missing_triton.__wrapped__()
    if not missing:
        assert why is None
        return
    assert why.startswith(f"triton must be 3.6 or newer for the kernels, got {version}")
    with pytest.raises(ImportError, match=r"triton must be 3\.6 or newer"):
        importlib.import_module("hdrq.kernels")
