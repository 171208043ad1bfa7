"""``hdrq parity``: what is equal passes, what was sabotaged is found and can be found again."""

import importlib
import json

import pytest
import torch

import hdrq
from hdrq.backends.dispatch import _load
from hdrq.parity import cases
from hdrq.parity import checker as parity

testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app

FAST = ["--backends", "torch"]


def call(*arguments):
    return testing.CliRunner().invoke(app, ["parity", "--seconds", "0", *arguments])


@pytest.fixture
def sabotaged(monkeypatch):
    """fake_quantize in plain PyTorch, wrong by a bit at element 5 of whatever has so many."""
    module = importlib.import_module("hdrq.backends.eager.fakequant")
    right = module.fake_quantize

    def wrong(*arguments):
        y = right(*arguments)
        y.view(-1)[5:6] = 1234.5
        return y

    monkeypatch.setattr(module, "fake_quantize", wrong)
    _load.cache_clear()
    yield
    _load.cache_clear()


def test_all_backends_of_this_machine_agree():
    report = parity.check(1)
    assert report.mismatches == []
    assert {t.op for t in report.tallies} == set(cases.OPS)
    assert {b.name for b in parity.available()} == {t.backend for t in report.tallies}
    assert all(
        t.cases and t.error < 1e-6 for t in report.tallies if t.backend != "triton" and not t.op.startswith("search")
    )


def test_every_public_op_has_cases():
    assert set(hdrq.ops.__all__) - {"MergedTensor", "adaround_init"} <= {name.partition(",")[0] for name in cases.OPS}


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("op", cases.OPS)
def test_a_case_is_a_function_of_op_seed_and_number(op, number):
    first, second = (cases.OPS[op].arguments(cases.Draw(op, 3, number)) for _ in range(2))
    assert str(first) == str(second)


def test_a_sabotaged_backend_is_found_and_found_again(sabotaged):
    report = parity.check(0, backends=["torch", "cpp"], families=["fakequant", "drop"])
    mismatch, conventions = report.mismatches
    assert conventions.op == "fake_quantize, conventions"
    assert (mismatch.op, mismatch.backend, mismatch.result, mismatch.index) == ("fake_quantize", "torch", "y", 5)
    assert mismatch.got != mismatch.want and mismatch.different == 1
    again = parity.repeat(mismatch.op, mismatch.backend, seed=mismatch.seed, case=mismatch.case)
    assert again == mismatch
    assert parity.repeat("drop_mix", "torch", seed=0, case=1) is None


def test_a_sabotaged_backend_ends_with_status_one(sabotaged):
    arguments = ("--backends", "torch", "--families", "fakequant")  # other ops are made of it
    result = call(*arguments)
    assert result.exit_code == 1
    assert "fake_quantize on torch: y at 5 is" in result.output
    assert "again: hdrq.parity.repeat('fake_quantize', 'torch', seed=0, case=" in result.output
    found, _ = (t["mismatch"] for t in json.loads(call("--json", *arguments).stdout)["tallies"] if t["mismatch"])
    assert found["index"] == 5 and found["arguments"]["x"].startswith("torch.")


def test_a_backend_that_raises_is_a_finding(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(importlib.import_module("hdrq.backends.eager.drop"), "drop_mix", broken)
    _load.cache_clear()
    (mismatch,) = parity.check(0, backends=["torch"], families=["drop"]).mismatches
    _load.cache_clear()
    assert (mismatch.result, mismatch.got) == ("error", "RuntimeError: no such kernel image")


def test_a_wrong_sum_is_found(monkeypatch):
    module = importlib.import_module("hdrq.backends.eager.distance")
    right = module.source_distance
    monkeypatch.setattr(module, "source_distance", lambda w, w_src: right(w, w_src) * (1 + 4e-6))
    _load.cache_clear()
    report = parity.check(0, seed=1, backends=["torch"], families=["distance"])
    _load.cache_clear()
    assert report.tallies[0].error == pytest.approx(4e-6, rel=0.1)
    assert [m.result for m in report.mismatches] == ["y"]


def test_a_sum_of_subnormal_products_is_as_close_as_any():
    """The gradient of a scale is −4.1e-40 in this case: a product that float32 rounds is 4e-6 from it."""
    native = [b.name for b in parity.available() if b.name.startswith("cpp")]
    assert native
    assert all(parity.repeat("fake_quantize", name, seed=0, case=1207) is None for name in native)


def test_json_says_what_was_compared():
    result = call("--json", "--families", "drop,distance", "--seed", "2", *FAST)
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert report["equal"] and report["seed"] == 2 and report["hdrq"] == hdrq.__version__
    assert [(t["op"], t["backend"]) for t in report["tallies"]] == [("drop_mix", "torch"), ("source_distance", "torch")]
    assert report["tallies"][0]["elements"] > 0 and report["tallies"][1]["sums"] > 0


def test_the_table_names_ops_and_backends():
    result = call("--families", "drop")
    assert result.exit_code == 0
    for name in ("drop_mix", *(b.name for b in parity.available())):
        assert name in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seconds", "-1"], "seconds must be finite and in"),
        (["--seconds", "nan"], "seconds must be finite and in"),
        (["--seed", "-1"], "seed must be in"),
        (["--backends", "cuda"], "backends must be one of"),
        (["--families", "nose"], "families must be one of 'noise'"),
    ],
)
def test_bad_arguments_end_with_two(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_missing_backend_says_why(monkeypatch):
    reasons = hdrq.available_backends() | {"triton": "triton is not installed"}
    monkeypatch.setattr("hdrq.parity.checker.available_backends", lambda: reasons)
    assert "triton was not compared: triton is not installed" in call("--families", "drop").output
    result = call("--backends", "triton")
    assert result.exit_code == 2 and "not installed" in " ".join(result.output.replace("│", " ").split())


def test_layouts_keep_their_strides_on_the_way_to_a_device():
    x = torch.arange(24.0).view(2, 3, 4).permute(2, 1, 0)[::2]
    assert cases._placed(x, "cpu").stride() == x.stride()
    assert torch.equal(cases._placed(x, "cpu"), x)
