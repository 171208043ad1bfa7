"""Merges in full precision, against their equations written out on whole vectors."""

import pytest
import torch
from networks import data, mergeable
from safetensors.torch import save_file

from hdrq.merging.float_merges import merge_float

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 7)}
BASE = {name: data(*shape, seed=9) for name, shape in SHAPES.items()}
EXPERTS = [{name: BASE[name] + data(*shape, seed=k) for name, shape in SHAPES.items()} for k in range(3)]


def vector(state):
    return torch.cat([value.double().flatten() for value in state.values()])


TAUS = [(vector(expert) - vector(BASE)).float() for expert in EXPERTS]


def merged(**options):
    return vector(merge_float(EXPERTS, None if options.get("merge", "average") == "average" else BASE, **options))


def test_the_average_and_task_arithmetic_are_their_equations():
    torch.testing.assert_close(merged(), sum(map(vector, EXPERTS)) / 3, rtol=0, atol=1e-6)
    unequal = merged(weights=[0.5, 0.25, 0.25])
    torch.testing.assert_close(unequal, sum(map(vector, EXPERTS)) / 4 + vector(EXPERTS[0]) / 4, rtol=0, atol=1e-6)
    want = vector(BASE) + 0.3 * sum(TAUS).double()
    torch.testing.assert_close(merged(merge="task-arithmetic"), want, rtol=0, atol=1e-6)


def trimmed(tau, keep):
    kept = int(keep * len(tau))
    threshold = 0 if kept == len(tau) else tau.abs().sort().values[len(tau) - kept - 1]
    return torch.where(tau.abs() >= threshold, tau, 0.0)


@pytest.mark.parametrize("trim", ["whole", "tensor"])
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_ties_is_its_equation(trim, aggregate, keep):
    sizes = [value.numel() for value in BASE.values()]
    parts = [[tau] if trim == "whole" else tau.split(sizes) for tau in TAUS]
    taus = [torch.cat([trimmed(part, keep) for part in split]) for split in parts]
    sign = sum(taus).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = [torch.where(tau.sign() == sign, tau, 0.0).double() for tau in taus]
    change = sum(agree)
    if aggregate == "mean":
        change = change / sum((a != 0).double() for a in agree).clamp(min=1)
    found = merged(merge="ties", aggregate=aggregate, trim=trim, keep=keep, scale=0.7)
    torch.testing.assert_close(found, vector(BASE) + 0.7 * change, rtol=0, atol=1e-6)


def test_of_a_vector_with_equal_magnitudes_all_of_the_threshold_are_kept():
    base, tau = {"w": torch.zeros(10)}, torch.tensor([3.0, -3, 2, 2, -2, 2, 1, 1, 1, 0])
    found = merge_float([{"w": tau}], base, merge="ties", keep=0.3)["w"]
    assert torch.equal(found, torch.where(tau.abs() >= 2, tau, 0.0))  # 6 where ⌊keep·d⌋ is 3


def test_where_the_sum_is_zero_the_majority_of_signs_decides():
    base, experts = {"w": torch.zeros(4)}, [{"w": torch.tensor([1.0, 5, 5, -5])}, {"w": torch.tensor([-1.0, 5, 5, -5])}]
    found = merge_float(experts, base, merge="ties", keep=1.0)["w"]
    assert torch.equal(found, torch.tensor([1.0, 5, 5, -5]))


def test_limits():
    one = merge_float(EXPERTS[:1], BASE, merge="ties", keep=1.0)
    assert all(torch.equal(value, EXPERTS[0][name]) for name, value in merge_float(EXPERTS[:1]).items())
    torch.testing.assert_close(one, EXPERTS[0])
    equal = [EXPERTS[0]] * 3
    assert all(torch.equal(value, EXPERTS[0][name]) for name, value in merge_float(equal).items())
    ties = merge_float(equal, BASE, merge="ties", keep=0.5)
    torch.testing.assert_close(ties, merge_float(equal[:1], BASE, merge="ties", keep=0.5))


def test_files_modules_and_half_types_are_merged_alike(tmp_path):
    models = [mergeable(seed) for seed in (0, 1)]
    for k, model in enumerate(models):
        save_file(model.state_dict(), tmp_path / f"{k}.safetensors")
    paths = [tmp_path / f"{k}.safetensors" for k in (0, 1)]
    options = {"base": mergeable(2), "merge": "ties"}
    from_files, in_memory = merge_float(paths, **options), merge_float(models, **options)
    assert from_files.keys() == models[0].state_dict().keys()
    assert all(torch.equal(value, in_memory[name]) for name, value in from_files.items())
    mean = (models[0].norm.running_var + models[1].norm.running_var) / 2
    torch.testing.assert_close(in_memory["norm.running_var"], mean)
    half = merge_float([{n: v.bfloat16() for n, v in expert.items()} for expert in EXPERTS])
    assert half["a.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        ([], {}, "the number of experts must be in"),
        (EXPERTS, {"base": BASE}, 'base must be left out with merge="average", got dict'),
        (EXPERTS, {"merge": "ties"}, 'base must be the model that the experts were trained from with merge="ties"'),
        (EXPERTS, {"merge": "ties", "base": BASE, "keep": 0.0}, "keep must be over 0"),
        (EXPERTS, {"merge": "ties", "base": BASE, "weights": [1, 0, 0]}, "weights must be left out"),
        (EXPERTS, {"scale": 1.0}, "scale must be left out"),
        (EXPERTS, {"keep": 0.2}, 'keep must be left out with merge="average", which trims nothing, got 0.2'),
        (EXPERTS, {"merge": "task-arithmetic", "base": BASE, "trim": "whole"}, "trim must be left out with merge="),
        (EXPERTS, {"kep": 0.2}, "an option must be one of 'aggregate', .*'weights', got 'kep'"),
        ([EXPERTS[0], {"a.weight": EXPERTS[0]["a.weight"]}], {}, r"experts\[1\] must be alike to experts\[0\], got a"),
        ([EXPERTS[0], {**EXPERTS[1], "a.bias": torch.ones(8)}], {}, r"a.bias is \(7,\) float32 and \(8,\) float32"),
        ([{"n": torch.ones(2).int()}, {"n": torch.zeros(2).int()}], {}, "n has other integers"),
        ([EXPERTS[0], {**EXPERTS[1], "a.bias": torch.full((7,), torch.nan)}], {}, r"a.bias of experts\[1\] must"),
        ([{"w": torch.full((2,), 6e4).half()}] * 2, {"merge": "task-arithmetic", "base": {"w": torch.zeros(2).half()},
          "scale": 1.0}, "w must stay finite in float16"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(experts, options, message):
    with pytest.raises(ValueError, match=message):
        merge_float(experts, **options)
    with pytest.raises(TypeError, match=r"experts\[0\] must be a module, a state dict or a path, got int"):
        merge_float([3])
