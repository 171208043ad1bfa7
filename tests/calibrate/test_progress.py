"""Bars on a terminal, lines of a log elsewhere; the figure of losses."""

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


def test_a_line_of_the_log_for_each_block_where_there_is_no_terminal(capsys, caplog):
    with caplog.at_level("INFO", logger="hdrq"), bars("mnist:") as show:
        for iteration in (50, 100):
            show(Step("layer1.0", 0, 3, iteration, 100, 0.125))
    assert caplog.messages == ["mnist: block 1 of 3, layer1.0: loss 0.125"]
    capsys.readouterr()
    with caplog.at_level("WARNING", logger="hdrq"), bars() as show:  # nobody listens to that level
        show(Step("layer1.0", 0, 3, 100, 100, 0.125))
    assert capsys.readouterr().err == ""


def test_losses_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    write_losses([("a", 50, 2.0), ("a", 100, 1.0), ("b", 50, 3.0)], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
