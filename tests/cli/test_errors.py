"""Whatever is wrong, every command ends with one line and a status, and steers no terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import quantized
from torch import nn

import hdrq
from hdrq.backends import dispatch
from hdrq.checkpoint.files import output_folder

for package in ("typer", "rich", "safetensors", "matplotlib"):
    pytest.importorskip(package)

from typer.testing import CliRunner  # noqa: E402

from hdrq.cli import app  # noqa: E402
from hdrq.cli.terminal import console  # noqa: E402
from hdrq.merging.files import readiness  # noqa: E402
from hdrq.report.figures import plot_readiness, write_losses  # noqa: E402

HOSTILE = "[/x]\x1b]0;title\x07$\\frac$"  # markup, a command to the terminal, and broken mathematics
COMMANDS = ("info", "quantize", "merge", "inspect", "evaluate", "demo", "bench", "parity")


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def file(tmp_path):
    hdrq.save(quantized(0), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def shell(*arguments, out, **environment):
    paths = os.pathsep.join([str(Path(hdrq.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "hdrq", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(command, env=environment, stdout=out, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["demo", "--colour"], "No such option: --colour"),
        (["demo", "--seed", "one"], "Invalid value for '--seed'"),
        (["bench", "nonsense"], "nonsense"),
        (["parity", "--families", "nonsense"], "families must be"),
        (["inspect", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("hdrq: ") and result.stderr.count("\n") == 1 and not result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_backend_that_is_none_is_refused_before_any_work(command, monkeypatch):
    monkeypatch.setenv("HDRQ_BACKEND", "nonsense")
    monkeypatch.setattr(dispatch, "_of_process", "nonsense")
    result = call(
        command, *{"merge": ["a", "b"], "inspect": ["a"], "evaluate": ["a", "--model=m", "--data=d"]}.get(command, [])
    )
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr == "hdrq: backend must be one of reference, torch, cpp, triton, got 'nonsense'\n"


def test_info_says_which_backend_the_environment_forces(monkeypatch):
    monkeypatch.setattr(dispatch, "_of_process", "reference")
    assert "runs on cpu  reference (HDRQ_BACKEND)" in call("info").stdout


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("x must be y,\ngot z"), 2, "hdrq: x must be y, got z"),
        (RuntimeError("a bug"), 2, "hdrq: RuntimeError: a bug; HDRQ_TRACEBACK=1 shows where"),
        (KeyError("a"), 2, "hdrq: KeyError: 'a'; HDRQ_TRACEBACK=1 shows where"),
        (AssertionError(), 2, "hdrq: AssertionError: ; HDRQ_TRACEBACK=1 shows where"),
        (hdrq.DivergenceError("0", "0.a", 3, float("nan"), 2), 1, "hdrq: loss of block 0 must be finite, got nan at"),
        (
            OSError(28, "No space left on device"),
            2,
            "hdrq: standard output must be written to a disk with room, got No",
        ),
        (OSError(28, "No space left on device", "/full"), 2, "hdrq: [Errno 28] No space left on device: '/full'"),
        (ImportError("No module named 'sklearn'"), 2, "hdrq: No module named 'sklearn'; pip install"),
        (RuntimeError(HOSTILE), 2, r"hdrq: RuntimeError: [/x]\x1b]0;title\x07$\frac$; HDRQ"),
    ],
)
def test_any_error_is_one_line_or_a_traceback_where_that_is_asked_for(error, status, line, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr("hdrq.backends.info.facts", fail)
    result = call("info")
    assert result.exit_code == status and result.stderr.startswith(line) and result.stderr.count("\n") == 1
    monkeypatch.setenv("HDRQ_TRACEBACK", "1")
    assert call("info").exception is error


def test_warnings_are_one_line(file, monkeypatch):
    import warnings

    def warn():
        warnings.warn(HOSTILE, stacklevel=1)
        return {}

    monkeypatch.setattr("hdrq.backends.info.facts", warn)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *rest: sys.stderr.write(
            warnings.formatwarning(message, category, *rest)
        )
        assert call("info").stderr == r"hdrq: warning: [/x]\x1b]0;title\x07$\frac$" + "\n"
    assert warnings.formatwarning is before


def test_names_of_others_steer_no_terminal(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model.add_module(HOSTILE, nn.Linear(4, 2))
    for k in range(2):
        made = hdrq.quantize(model, torch.randn(9, 4), "rtn")
        made.hdrq_origin["fingerprints"][HOSTILE] = HOSTILE
        hdrq.save(made, tmp_path / f"{k}", architecture=HOSTILE)
    monkeypatch.setattr(console, "width", 200)
    for result in (call("inspect", tmp_path / "0"), call("merge", tmp_path / "0", tmp_path / "1", "--dry-run")):
        assert result.exit_code == 0 and "\x1b" not in result.stdout and "[/x]" in result.stdout


def test_figures_take_any_name(tmp_path):
    write_losses([("_blocks.0", 0, 1.0), (HOSTILE, 0, 2.0)], tmp_path / "losses.png")
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.add_module(HOSTILE, nn.Linear(4, 2))
    made = hdrq.quantize(model, torch.randn(9, 4), "rtn")
    plot_readiness(readiness([made, made], draws=1), tmp_path / "readiness.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("losses", "readiness"))


def test_a_report_that_cannot_be_is_refused_before_the_merge(file, tmp_path):
    (tmp_path / "taken").write_text("")
    for report in (tmp_path / "taken", tmp_path / "taken" / "below"):
        result = call("merge", file, file, "-o", tmp_path / "m", "--report", report)
        assert result.exit_code == 2 and "report must be a folder, or a new one in a folder, got" in result.stderr
    assert not (tmp_path / "m").exists()
    assert call("merge", file, tmp_path / "none", "--dry-run", "--report", tmp_path / "new").exit_code == 2
    assert not (tmp_path / "new").exists()
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not (tmp_path / "a").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_one_line(file):
    with open("/dev/full", "w") as full:
        result = shell("inspect", file, out=full)
    assert result.returncode == 2 and result.stderr.startswith(b"hdrq: standard output must be written to")
    assert result.stderr.count(b"\n") == 1


def test_a_terminal_of_ascii_shows_escapes(file):
    result = shell("inspect", "ö\u200b.safetensors", out=subprocess.PIPE, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert result.returncode == 2 and rb"\xf6\u200b.safetensors" in result.stderr
    assert shell("merge", "-h", out=subprocess.PIPE, PYTHONIOENCODING="ascii", LC_ALL="C").returncode == 0
