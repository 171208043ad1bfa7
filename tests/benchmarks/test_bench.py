"""``hdrq bench``: what it prints and writes, what it refuses, and that every bench can run. Nothing here is timed."""

import csv
import dataclasses
import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package)

testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app
harness, report = (pytest.importorskip(f"hdrq.benchmarks.{name}") for name in ("harness", "report"))
SHAPES = pytest.importorskip("hdrq.benchmarks.shapes").SHAPES

QUICK = ("bench", "drop", "--quick", "--sizes", "500", "--threads", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Nobody reads these figures."""
    monkeypatch.setattr(harness, "SECONDS", 0.0)
    monkeypatch.setattr(harness, "SHORTEST", 0.0)


def call(*arguments):
    return testing.CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("family", harness.families())
@pytest.mark.parametrize("shape", [(1000,), (6, 5, 3, 3)])
def test_every_bench_verifies_and_runs(family, shape):
    bench = harness.load(family)
    for dtype in bench.dtypes:
        tensors = bench.inputs(shape, "cpu", dtype)
        bench.verify(*tensors)
        for operation, make in bench.operations.items():
            providers = make(*tensors)
            assert [p.name for p in providers[:2]] == [harness.COPY, harness.CLONE]
            assert any(p.ours for p in providers) and len({p.name for p in providers}) == len(providers), operation
            usable, left_out = harness._usable(providers, compile=False)
            assert {p.name for p in providers if p.ours} <= {p.name for p in usable}
            assert dtype != torch.float32 or not left_out


def test_the_command_prints_tables():
    result = call(*QUICK)
    assert result.exit_code == 0, result.output
    for line in ("drop_mix forward, 500 elements, float32, 1 thread", "drop_mix backward, 500", "Where we lose"):
        assert line in result.stdout
    for provider in (harness.COPY, harness.CLONE, "hdrq", "official formula, eager"):
        assert f"\n{provider} " in result.stdout
    assert "torch.compile" not in result.stdout and result.stderr == ""


def test_json_is_json_and_its_figures_agree():
    result = call(*QUICK, "distance", "--json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(result.stdout, parse_constant=refuse)
    assert result.exit_code == 0 and record["failures"] == [] and record["torch"] and record["processor"]
    assert [f["family"] for f in record["figures"]] == sorted((f["family"] for f in record["figures"]), reverse=True)
    for f in record["figures"]:
        assert f["p20"] <= f["p50"] <= f["p80"] and f["elements"] == 500
        assert f["gigabytes_per_second"] == pytest.approx(f["bytes_per_element"] / f["p50"])
        assert f["reached"] == pytest.approx(f["floor"] / f["p50"])
        if f["provider"] in (harness.COPY, harness.CLONE):
            assert f["over_copy"] == pytest.approx(1)
        if f["provider"] == harness.COPY:
            assert f["reached"] == pytest.approx(1)
        if f["provider"].startswith("official"):
            assert f["speedup"] == pytest.approx(1)


def test_out_writes_figures_and_a_plot(tmp_path):
    folder = tmp_path / "made" / "here"
    assert call(*QUICK, "--out", str(folder)).exit_code == 0
    assert {p.name for p in folder.iterdir()} == {"drop-cpu.csv", "drop-cpu.json", "drop-cpu.png"}
    with open(folder / "drop-cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    record = json.loads((folder / "drop-cpu.json").read_text())
    assert [row["provider"] for row in rows] == [f["provider"] for f in record["figures"]]
    assert (folder / "drop-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_shapes_are_layers_and_keep_their_axes(monkeypatch):
    seen = []
    bench = harness.load("drop")
    watch = dataclasses.replace(bench, inputs=lambda shape, *rest: seen.append(shape) or bench.inputs((100,), *rest))
    monkeypatch.setattr("hdrq.benchmarks.bench_drop.BENCH", watch)
    result = call("bench", "drop", "--quick", "--seconds", "60", "--shapes", "vit-b", "--threads", "1")
    assert result.exit_code == 0 and seen == list(SHAPES["vit-b"].values())
    assert "drop_mix forward, vit-b attention qkv, 1,769,472 elements" in result.stdout


def test_a_failed_verification_ends_with_one_and_the_rest_still_runs(monkeypatch):
    def verify(*tensors):
        raise harness.Mismatch("two and two are five")

    bench = dataclasses.replace(harness.load("drop"), verify=verify)
    monkeypatch.setattr("hdrq.benchmarks.bench_drop.BENCH", bench)
    result = call(*QUICK, "distance")
    assert result.exit_code == 1
    assert "drop_mix, 500, float32, 1 thread: two and two are five" in result.stdout
    assert "drop_mix forward" not in result.stdout and "source_distance forward" in result.stdout


def test_wrong_bits_are_a_mismatch():
    draws = iter([torch.zeros(4), torch.tensor([0.0, 1.0, 0.0, 2.0])])
    with pytest.raises(harness.Mismatch, match="the op differs from the reference in 2 of 4 elements"):
        harness.same_as_reference("the op", lambda: next(draws))


def test_a_gpu_is_timed_by_triton_and_names_its_files(monkeypatch, tmp_path):
    testing = pytest.importorskip("triton.testing")
    signature = inspect.signature(testing.do_bench)

    def do_bench(*args, **kwargs):
        asked = signature.bind(*args, **kwargs).arguments
        asked["fn"]()
        assert asked["return_mode"] == "all" and asked["rep"] >= 1
        return [1.0, 2.0, 3.0]  # milliseconds

    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    providers = [*harness.copies(torch.zeros(1000)), harness.Provider("hdrq", lambda: None, 8)]
    times = harness._times(providers, "cuda", 0.0)
    assert times == [[1e-3, 2e-3, 3e-3] * harness.ROUNDS] * 3
    figures = harness._figures(("drop", "copy", "1000", 1000, "float32", 1), providers, times)
    report.write(harness.Result(figures), "cuda", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"drop-nvidia-h200-sxm.{end}" for end in ("csv", "json", "png")}


def test_a_type_that_a_family_does_not_take_is_named():
    record = json.loads(call("bench", "distance", "--quick", "--dtypes", "bfloat16", "--json").stdout)
    assert record["figures"] == [] and record["left out"] == ["distance: takes float32, not bfloat16"]


def test_what_time_does_not_allow_is_named():
    result = call(*QUICK, "--seconds", "1e-9", "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0 and record["figures"] == []
    assert record["left out"] == ["drop_mix, 500, float32, 1 thread: out of time"]


def test_a_provider_that_fails_is_left_out_unless_it_is_ours():
    def broken():
        raise RuntimeError("not for this device\nmore")

    providers = [*harness.copies(torch.zeros(3)), harness.Provider("theirs", broken, 8)]
    usable, left_out = harness._usable(providers, compile=True)
    assert usable == providers[:2] and left_out == ["theirs fails, RuntimeError: not for this device"]
    with pytest.raises(RuntimeError, match="not for this device"):
        harness._usable([harness.Provider("hdrq", broken, 8)], compile=True)


def test_where_we_lose_is_where_another_is_faster_than_what_a_user_calls():
    medians = {harness.COPY: 0.5, harness.CLONE: 1.0, "hdrq": 2.0, "hdrq, kernel alone": 1.0, "fast": 1.5, "slow": 3.0}
    providers = [harness.Provider(name, lambda: None, 8, name != harness.COPY) for name in medians]
    times = [[1e-7 * median] * 5 for median in medians.values()]
    figures = harness._figures(("family", "op forward", "100", 100, "float32", 1), providers, times)
    assert report.losses(figures) == ["op forward, 100 elements, float32, 1 thread: fast takes 0.75 of our time"]
    ours = figures[2]
    assert (ours.floor, ours.reached, ours.over_copy) == pytest.approx((0.5, 0.25, 2.0)) and ours.speedup is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["colour"], "family must be one of"),
        (["--sizes", "0"], "must be an integer of at least 1, got '0'"),
        (["--sizes", "many"], "must be an integer of at least 1, got 'many'"),
        (["--threads", "100000"], "must be an integer in [1, "),
        (["--shapes", "lenet"], "invalid choice: 'lenet'"),
        (["--dtypes", "float64"], "invalid choice: 'float64'"),
        (["--seconds", "-1"], "must be a positive number, got '-1'"),
        (["--seconds", "nan"], "must be a positive number, got 'nan'"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--out", __file__], "must be a folder that can be written to"),
    ],
)
def test_bad_arguments_end_with_two_and_a_message(arguments, message):
    result = call("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is available")
def test_a_device_that_is_missing_is_a_bad_argument():
    result = call("bench", "--device", "cuda")
    assert result.exit_code == 2 and "cuda is not available here" in result.stderr


def test_layers_are_shapes():
    for layers in SHAPES.values():
        assert all(math.prod(shape) > 0 and len(shape) > 1 for shape in layers.values())


def test_the_script_for_a_gpu_names_tests_that_exist():
    root = Path(__file__).parents[2]
    script = (root / "benchmarks" / "gpu.sh").read_text()
    names = re.search(r"\$\{TESTS:-(.*?)\}", script, re.DOTALL)[1].replace("\\\n", " ").split()
    assert len(names) > 10
    assert [
        n for n in names if not (root / "tests" / f"{n.rpartition('/')[0]}/test_{n.rpartition('/')[2]}.py").exists()
    ] == []
    program = re.search(r"show_facts='(.*)'", script)[1]
    assert (
        "torch: " in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    )
