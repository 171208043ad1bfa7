"""Which of a test's interpreted cases run: few, with every value of every parameter (``spread`` of conftest.py)."""

from pathlib import Path

import pytest

CASES = """
import pytest

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 255), (0, 15)])
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_case(backend, low, high, axis, dtype):
    pass
"""
pytest_plugins = "pytester"


@pytest.mark.parametrize("every", [False, True])
def test_few_interpreted_cases_have_every_value(pytester, monkeypatch, every):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("HDRQ_ALL_CASES", raising=False)
    if every:
        monkeypatch.setenv("HDRQ_ALL_CASES", "1")
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(CASES)
    (finished,) = pytester.inline_run("--collect-only").getcalls("pytest_collection_finish")
    items = finished.session.items
    params = [item.callspec.params for item in items if item.callspec.params["backend"] == "triton"]
    assert sum(item.callspec.params["backend"] == "cpp" for item in items) == 27
    assert len(params) == 27 if every else 3 <= len(params) <= 9
    for name, count in {"dtype": 3, "axis": 3, "low": 2, "high": 3}.items():
        assert len({p[name] for p in params}) == count
