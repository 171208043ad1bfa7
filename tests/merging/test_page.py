"""The page on adapters: its blocks run, and its figures are those that were committed."""

import json
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "added-changes.json").read_text())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1])
def test_block(block, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        exec(compile(block, "adapters.md", "exec"), {})
    assert "kept" in capsys.readouterr().out


def cells(start):
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {start}"))
    return [[float(number) for number in re.findall(r"\d+\.\d+", cell)] for cell in row.split("|")[2:-1]]


RULES = ("nearest", "systematic", "noise", "calibrated")


@pytest.mark.parametrize("steps", [0.05, 0.2, 0.5])
def test_figures_of_one_weight(steps):
    rows = {row["rule"]: row for row in FIGURES["weight"] if row["steps"] == steps}
    assert cells(f"{steps}: share kept") == [[round(rows[rule]["kept"], 2)] for rule in RULES]
    assert cells(f"{steps}: error") == [[round(rows[r]["error"], 2), round(rows[r]["inputs"], 2)] for r in RULES]


@pytest.mark.parametrize(("bits", "scale", "start"), [
    ("W4A8", 1.0, "W4A8, the"), ("W4A8", 0.25, "W4A8, a"), ("W3A8", 1.0, "W3A8, the"), ("W3A8", 0.25, "W3A8, a"),
])  # fmt: skip
def test_figures_of_adapters(bits, scale, start):
    rows = [row["accuracy"] for row in FIGURES["adapters"] if (row["bits"], row["scale"]) == (bits, scale)]
    names = ("none", *RULES, "unrounded")
    assert len(rows) == 9
    assert cells(start) == [[round(sum(row[name] for row in rows) / 9, 1)] for name in names]
