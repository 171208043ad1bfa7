"""Bars on a terminal, silence elsewhere; the figure of losses."""

import io
import sys

import pytest

from hdrq.calibrate.progress import Step, bars
from hdrq.report.figures import write_losses

pytest.importorskip("rich")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_say_block_iteration_and_loss(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    with bars("mnist:") as show:
        show(Step("layer1.0", 0, 3, 50, 100, 0.125))
        show(Step("layer1.1", 1, 3, 100, 100, 0.0625))
    text = sys.stderr.getvalue()
    for word in ("mnist: block 2 of 3", "200/300", "layer1.1, loss 0.0625", "100/100"):
        assert word in text


def test_silence_where_there_is_no_terminal(capsys):
    with bars() as show:
        assert show is None
    assert capsys.readouterr().err == ""


def test_losses_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    write_losses([("a", 50, 2.0), ("a", 100, 1.0), ("b", 50, 3.0)], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
