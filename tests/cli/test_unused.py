"""An option that nothing would read is refused by its name, before any file is read."""

import pytest

pytest.importorskip("rich")
testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app

MERGE = ("merge", "a", "b", "-o", "m")
ADD = ("merge", "a", "--add", "b", "-o", "m")
EXPORT = ("export", "a", "--model", "nets:net")
EVALUATE = ("evaluate", "a", "--model", "nets:net", "--data", "images")
QUANTIZE = ("quantize", "--model", "nets:net", "--data", "images")
POST = ("post-merge", "a", "b", "--model", "nets:net", "--data", "x", "--data", "y", "-o", "m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MERGE, "--samples", 3), "samples must be left out without --calibrate and --add, got 3"),
        ((*MERGE, "--rule", "calibrated", "--crop", 8), "crop must be left out in a calibrated merge without --cal"),
        (("merge", "a", "b", "--dry-run", "--force"), "force must be left out with --dry-run, which merges nothing"),
        ((*ADD, "--resize", 8), "resize must be left out with --add and without --data, got 8"),
        ((*ADD, "--sweep", "0.5"), "sweep must be left out with --add, got 0.5"),
        ((*ADD, "--force"), "force must be left out with --add, got True"),
        ((*ADD, "--minus", "c", "--alpha", 2), "alpha must be left out but for adapters, got 2.0 for differences"),
        (("export", "a", "--like", "b", "-o", "m", "--check"), "check must be left out with --like, got True"),
        (("export", "a", "--like", "b", "-o", "m", "--data", "x"), "data must be left out with --like, got x"),
        ((*EXPORT, "-o", "m.onnx", "--activations", "drop"), "activations must be left out for onnx, got drop"),
        ((*EXPORT, "-o", "m.pt2", "--opset", 21), "opset must be left out for pt2, got 21"),
        ((*EXPORT, "-o", "m", "--to", "compressed-tensors", "--check"), "check must be left out for compressed-te"),
        ((*EXPORT, "-o", "model", "--data", "x"), "to must be given where out ends in none of .onnx, .pt2, got 'mod"),
        ((*EVALUATE, "--split", "test"), "split must be left out without --label-maps, got test"),
        ((*EVALUATE, "--label-maps", "plain", "--mean", "0,0,0"), "mean must be left out with --label-maps, got 0"),
        ((*QUANTIZE, "--jobs", 4), "jobs must be left out for one model, which has one process; give a YAML file"),
        ((*QUANTIZE, "--save-config", "c", "--json"), "json must be left out with --save-config, which quantizes no"),
        ((*QUANTIZE, "--set", "seed=1", "--set", "seed=2"), "set must give each name once, got more of seed"),
        ((*QUANTIZE, "--set", "seed=1", "--seed", 2), "seed must be left out where --set gives it, got 2"),
        ((*POST, "--set", "group_size=8", "--group-size", 4), "group_size must be left out where --set gives it"),
    ],
)  # fmt: skip
def test_an_option_that_nothing_reads_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = testing.CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    assert not any(tmp_path.iterdir())


def test_what_is_the_default_may_not_be_given_either_and_what_is_not_given_is_not_refused(tmp_path, monkeypatch):
    """Whether an option was given counts, not whether it has another value than its default."""
    monkeypatch.chdir(tmp_path)
    said = [testing.CliRunner().invoke(app, [*MERGE, *more]).stderr for more in (("--samples", "256"), ())]
    assert "samples must be left out" in said[0] and "path must be a file that hdrq.save wrote, got 'a'" in said[1]
