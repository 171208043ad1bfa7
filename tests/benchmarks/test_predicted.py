"""Figures of a GPU stand beside what its published rates and the count of instructions allow."""

import json

import pytest

from hdrq.benchmarks import harness, predicted
from hdrq.benchmarks.budget import MACHINES


def figure(operation, elements, nanoseconds, dtype="float32", provider="hdrq", size=8):
    return {"operation": operation, "elements": elements, "p50": nanoseconds, "dtype": dtype} | {
        "provider": provider,
        "bytes_per_element": size,
    }


def record(*figures, gpu="NVIDIA H100 80GB HBM3"):
    return {"gpu": gpu, "figures": list(figures)}


def test_the_largest_size_is_compared_with_the_slower_of_issue_and_memory():
    sizes = [figure("noise_quantize forward, uniform", n, t) for n, t in ((2**26, 0.003), (4096, 2.0))]
    (line,) = predicted.lines(record(*sizes, figure("noise_quantize forward, uniform", 2**26, 1.0, provider="clone")))
    assert str(line.case) == "noise forward f32 one" and line.elements == 2**26
    assert line.measured == pytest.approx(3.0)
    assert line.move == pytest.approx(8 / (0.9 * 3.35e12) * 1e12)
    assert line.issue == pytest.approx(29 / 1.08 / MACHINES["H100"].issue * 1e12)
    assert line.ratio == pytest.approx(line.measured / line.move)  # memory is the slower


def test_half_types_and_instructions_that_outweigh_memory():
    (line,) = predicted.lines(record(figure("adaround forward", 2**24, 0.01, "float16", size=8), gpu="NVIDIA B200"))
    assert str(line.case) == "adaround forward penalty bf16 one" and line.ratio == line.measured / line.issue


def test_figures_of_other_kinds_are_passed_over():
    step = {"block": "ViT-B block", "step": "hdrq", "p50": 1.0}  # as the bench of a step writes them
    assert predicted.lines(record(step)) == []


def test_every_operation_named_is_one_of_the_benches():
    known = {f"{harness.load(f).op} {op}" for f in harness.families() for op in harness.load(f).operations}
    assert {operation for operation, _ in predicted.LAUNCHED} <= known


def test_the_command_prints_a_line_an_op_and_leaves_out_other_machines(tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps(record(figure("drop_mix forward", 8, 1.0), gpu="none")))
    assert predicted.main([str(tmp_path)]) == 1 and "no figures of H100" in capsys.readouterr().out
    (tmp_path / "gpu.json").write_text(json.dumps(record(figure("drop_mix forward", 8, 1.0, size=12))))
    assert predicted.main([str(tmp_path)]) == 0
    assert "drop forward f32 one" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must be one of H100, H200, B200, MI300X, got RTX 4090"):
        predicted.lines(record(gpu="RTX 4090"))
