"""Adapters and differences into quantized models: peft's layout, whole models, refusals, and what a file says."""

import json
import math

import pytest
import torch
from helpers import same, state
from merging.adding_models import (
    TOKENS,
    adapter,
    close,
    code_shift,
    digest,
    factors,
    latents,
    net,
    quantized,
    save,
)
from networks import SAMPLES, Mergeable, data, mergeable
from safetensors.torch import save_file
from torch import nn

import hdrq
from hdrq.checkpoint import format
from hdrq.checkpoint.inspection import contents
from hdrq.checkpoint.saving import state_of
from hdrq.merging import add, add_file
from hdrq.merging.changes import Change, listed_changes
from hdrq.quantizers.layers import quantized_layers


def test_a_model_that_is_one_layer(tmp_path):
    model = hdrq.quantize(nn.Linear(8, 4).eval(), data(32, 8), "rtn", bits="W8A8")
    hdrq.save(model, tmp_path / "q")
    add_file(tmp_path / "q", {"weight": data(4, 8) * 0.1}, tmp_path / "out")
    close(hdrq.load(tmp_path / "out", nn.Linear(8, 4)), model, {"weight": data(4, 8) * 0.1})


def test_difference_of_files_on_one_grid_is_exact(model, tmp_path):
    """A + (B − C) of integers, whatever the rule."""
    with torch.no_grad():
        b, c = hdrq.load(save(model, tmp_path / "b"), net()), hdrq.load(tmp_path / "b", net())
        for number, other in enumerate((b, c)):
            for k, layer in enumerate(quantized_layers(other).values()):
                quantizer = layer.weight_quantizer
                shift = torch.randint(
                    -2, 3, layer.latent.shape, generator=torch.Generator().manual_seed(9 * number + k)
                )
                moved = (quantizer.codes(layer.latent) + shift).clamp(-100, 100)
                layer.latent.copy_(quantizer.values(moved.to(torch.int8)))
    change = Change(save(b, tmp_path / "b"), minus=save(c, tmp_path / "c"))
    for rule in ("systematic", "nearest", "noise"):
        found = add_file(save(model, tmp_path / "a"), change, tmp_path / "out", rule=rule)
        assert found.error < 1e-12
        result = hdrq.load(tmp_path / "out", net())
        for name, layer in quantized_layers(result).items():
            codes = [quantized_layers(m)[name].weight_quantizer.codes(latents(m)[name]).int() for m in (model, b, c)]
            want = (codes[0] + codes[1] - codes[2]).clamp(-128, 127)
            assert torch.equal(layer.weight_quantizer.codes(layer.latent).int(), want)


def test_difference_of_states_in_full_precision(model, tmp_path):
    b, c = net(1).state_dict(), net(2).state_dict()
    for name in b:
        b[name] = c[name] + 0.01 * b[name]
    want = {name: 0.5 * (b[name] - c[name]) for name in b}
    save_file(b, tmp_path / "b.safetensors")
    folder = tmp_path / "c"
    folder.mkdir()
    halves = [dict(list(c.items())[:5]), dict(list(c.items())[5:])]
    for k, half in enumerate(halves):
        save_file(half, folder / f"{k}.safetensors")
    index = {"weight_map": {name: f"{k}.safetensors" for k, half in enumerate(halves) for name in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = add(model, Change(tmp_path / "b.safetensors", minus=folder, scale=0.5))
    close(found.model, model, want)
    facts = found.model.hdrq_origin["added"]["changes"][0]
    files = [folder / "model.safetensors.index.json", folder / "0.safetensors", folder / "1.safetensors"]
    assert facts["sha256"] == {"add": [digest(tmp_path / "b.safetensors")], "minus": [digest(f) for f in files]}
    again = add(model, [Change(b, minus=c, scale=0.5)]).model
    assert same(state(again), state(found.model))
    mixed = add(model, Change(save(quantized(1, bits="W4A8"), tmp_path / "q4"), minus=net(1).state_dict())).report
    assert {row.name for row in mixed.tensors} == {f"{n}.weight" for n in ("embed", "wide", "square", "conv", "out")}


def test_scales_of_activations_and_of_weights_stay(model):
    changed = add(model, {"wide.weight": torch.full((12, 8), 0.1)}).model
    for name, value in model.state_dict().items():
        if name.endswith("scale") or "_extra_state" in name:
            assert torch.equal(changed.state_dict()[name], value)
    assert not torch.equal(changed.wide.weight, model.wide.weight) and same(state(changed.conv), state(model.conv))


def test_file_and_memory_agree_and_the_file_is_left(model, file, tmp_path):
    path = adapter(tmp_path / "lora", factors(model, "wide", "head", "conv"))
    before = file.read_bytes()
    for rule in ("systematic", "noise"):
        report = add_file(file, path, tmp_path / "out", rule=rule, seed=4)
        found = add(model, path, rule=rule, seed=4)
        assert same(state(hdrq.load(tmp_path / "out", net())), state(found.model)) and report == found.report
    assert add_file(file, path, None, rule="noise", seed=4) == report
    assert file.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "lora",
        "out",
        "q.safetensors",
    ]
    assert not same(state(add(model, path, seed=5).model), state(add(model, path, seed=4).model))
    add_file(file, path, file)  # in place of itself
    assert same(state(hdrq.load(file, net())), state(add(model, path).model))


def test_layers_are_read_as_they_are_written(model, file, tmp_path, monkeypatch):
    events = []
    read, write = format.Reader.tensor, format.Writer.write
    monkeypatch.setattr(format.Reader, "tensor", lambda self, n: (events.append(("read", n)), read(self, n))[1])
    monkeypatch.setattr(format.Writer, "write", lambda self, n, v: (events.append(("write", n)), write(self, n, v))[1])
    add_file(file, Change(factors(model, "wide", "conv"), alpha=1), tmp_path / "out")
    codes = [event for event in events if event[1].endswith("codes")]
    names = ("conv", "wide", "embed", "out", "square")  # changed ones first
    assert sorted(codes) == sorted((e, f"{n}.weight.codes") for n in names for e in ("read", "write"))
    assert all(codes[k][1] == codes[k + 1][1] for k in range(0, len(codes), 2))


def test_a_file_says_what_was_added_to_what(model, file, tmp_path):
    path = adapter(tmp_path / "lora", factors(model, "wide", scale=0.002))
    first, second = tmp_path / "first", tmp_path / "second"
    add_file(file, Change(path, scale=0.5), first, seed=3)
    with format.Reader(first) as opened:
        manifest = opened.manifest
    hashes = [digest(path / name) for name in ("adapter_model.safetensors", "adapter_config.json")]
    change = {"kind": "adapter", "alpha": None, "scale": 0.5, "sha256": {"add": hashes}}
    assert manifest["added"] == {"rule": "systematic", "seed": 3, "changes": [change]}
    assert manifest["parent"]["sha256"] == digest(file)
    assert manifest["parent"]["recipe"] == state_of(model)[0]["recipe"] and "recipe" not in manifest
    assert manifest["coverage"] == state_of(model)[0]["coverage"]
    assert contents(first).history.parents[0].sha256 == digest(file) and contents(first).problems == ()
    add_file(first, Change(path, scale=0.5), second, seed=3)
    with format.Reader(second) as opened:
        assert opened.manifest["parent"]["parent"]["sha256"] == digest(file)
    shifts = [code_shift(a, b) for a, b in ((model, first), (first, second))]
    quantizer = quantized_layers(model)["wide"].weight_quantizer
    inside = quantizer.codes(latents(model)["wide"]).abs() < 100  # nothing is clipped there
    assert not torch.equal(*(shift[inside] for shift in shifts))  # the same change and seed, other coins
    merged = hdrq.merge([hdrq.load(p, net()) for p in (first, second)])
    assert merged.hdrq_origin["models"][1]["parent"]["added"] == manifest["added"]


def test_calibrated_rounding_of_a_model_and_of_its_file(model, file, tmp_path):
    path = adapter(tmp_path / "lora", factors(model, "wide", "square", "conv", "embed", scale=0.002))
    with pytest.warns(UserWarning, match=r"rule calibrated could not serve embed\.weight \(systematic\), which took"):
        found = add(model, path, rule="calibrated", calibration=TOKENS)
    with pytest.warns(UserWarning, match="could not serve"):
        report = add_file(file, path, tmp_path / "out", rule="calibrated", calibration=TOKENS, model=net())
    assert report == found.report
    assert same(state(hdrq.load(tmp_path / "out", net())), state(found.model))
    added = found.model.hdrq_origin["added"]
    assert added["damping"] == 0.01 and len(added["calibration"]) == 16
    plain = add(model, path, calibration=TOKENS)
    assert "calibration" not in plain.model.hdrq_origin["added"]
    for row, other in zip(report.tensors, plain.report.tensors, strict=True):
        if row.name in ("wide.weight", "square.weight", "conv.weight"):
            assert row.rule == "calibrated" and row.input_error < other.input_error
    assert [row.input_error is None for row in plain.report.tensors] == [False, True, False, False]


def test_group_scales(tmp_path):
    model = quantized(group_size=4)
    change = {"wide.weight": data(12, 8) * 0.02, "square.weight": data(12, 12) * 0.02}
    close(add(model, change).model, model, change)
    found = add(model, change, rule="calibrated", calibration=TOKENS)
    assert {row.rule for row in found.report.tensors} == {"calibrated"}
    hdrq.save(model, tmp_path / "q")
    add_file(tmp_path / "q", change, tmp_path / "out")
    assert same(state(hdrq.load(tmp_path / "out", net())), state(add(model, change).model))


def test_what_should_not_be_overlooked_is_a_warning(model):
    small = {"wide.weight": torch.full((12, 8), 1e-4)}
    with pytest.warns(UserWarning, match=r'less than half of the change is kept in wide\.weight \(0%\); rule="system'):
        found = add(model, small, rule="nearest")
    assert found.report.kept == 0 and found.report.error == 1
    with pytest.warns(UserWarning, match=r"more than 5% of the weights are clipped to their range in wide\.weight \("):
        add(model, {"wide.weight": torch.full((12, 8), 1.0)})
    with pytest.warns(UserWarning, match="the change is zero everywhere: the model is what it was"):
        nothing = add(model, {"wide.weight": torch.zeros(12, 8)})
    assert nothing.report.tensors == () and nothing.report.kept == 1 and same(state(nothing.model), state(model))


def test_other_bad_input_is_refused_and_leaves_no_file(model, file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    other = adapter(tmp_path / "lora", factors(model, "wide"))
    (other / "adapter_config.json").write_text("[1]")
    b, c = net(1).state_dict(), net(2).state_dict()
    save_file(b, tmp_path / "b.safetensors")
    integers = {name: torch.arange(3) + k for k, name in enumerate("xy")}
    lora = factors(model, "wide")
    cases = [
        (tmp_path / "none", FileNotFoundError, "add must be a file or a folder that exists, got"),
        (tmp_path / "empty", ValueError, "minus must be given for .*empty, which is no adapter"),
        (Change(tmp_path / "empty", minus=c), ValueError, "weights must be a file, or a folder with"),
        (tmp_path / "broken", ValueError, "adapter must hold adapter_model.safetensors or adapter_model.bin beside"),
        (other, ValueError, "adapter_config.json must be a table of settings, got list"),
        (tmp_path / "b.safetensors", ValueError, "minus must be given for .*b.safetensors, which is no adapter"),
        (lora, ValueError, "alpha must be given for change 0, which has no adapter_config.json beside it"),
        (Change(lora, alpha=1, minus=lora), ValueError, "minus must be left out for an adapter"),
        (Change(b, minus=c, alpha=1), ValueError, "alpha must be left out but for an adapter, got 1"),
        (Change(b, minus={**c, "more": data(2)}), ValueError, "must be alike, got more is in one alone"),
        (Change({**b, "out.weight": data(2, 2)}, minus=c), ValueError, r"alike, got out\.weight is \(2, 2\) float32"),
        (Change({"a": integers["x"]}, minus={"a": integers["y"]}), ValueError, "a has other integers"),
        ({"none.weight": data(2)}, ValueError, r"must be for tensors of the model, got none\.weight, which it"),
        ({"out.weight": data(2, 2)}, ValueError, r"must have weights of the model's shapes, got out\.weight \(2, 2\)"),
        ({"out.weight": 3}, TypeError, "change 0 must be tensors by name, got int for 'out.weight'"),
        ({"out.weight": torch.full((11, 8), torch.inf)}, ValueError, "the change of out.weight must be finite"),
        ([], ValueError, "changes must be one or more, got none"),
        (3, TypeError, "changes must be a hdrq.Change, a path or tensors by name, got int"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            add_file(file, change, tmp_path / "out")
    with pytest.raises(TypeError, match="add must be a path, or tensors by name, got int"):
        Change(3)
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        Change("x", scale=math.inf)
    for options, message in (
        ({"rule": "up"}, "rule must be one of 'systematic', 'nearest', 'noise', 'calibrated', got 'up'"),
        ({"rule": "calibrated"}, 'calibration must be given for rule "calibrated"'),
        ({"calibration": TOKENS}, "model must be given with calibration, whose inputs layers must be shown, got None"),
        ({"seed": -1}, "seed must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            add_file(file, {"out.weight": data(11, 8)}, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"must be results of hdrq\.quantize, got a plain Net"):
        add(net(), {"out.weight": data(11, 8)})
    assert sorted(tmp_path.rglob("*")) == before


def test_integers_and_counts_have_no_part_in_a_difference():
    model = hdrq.quantize(mergeable(0), SAMPLES, "rtn", bits="W8A8")
    b, c = (mergeable(seed).state_dict() for seed in (1, 2))
    found = add(model, Change(b, minus=c, scale=0.1)).model
    assert torch.equal(found.table, model.table) and found.norm.num_batches_tracked == model.norm.num_batches_tracked
    torch.testing.assert_close(found.gain, model.gain + 0.1 * (b["gain"] - c["gain"]))
    assert type(found) is Mergeable


def test_lists_of_a_command_line_go_together():
    assert listed_changes(["a"]) == [Change("a")]
    assert listed_changes(["a", "b"], ["-", "c"], [2.0, 3.0], alpha=4) == [
        Change("a", None, 2.0, 4),
        Change("b", "c", 3.0),
    ]
    with pytest.raises(ValueError, match='minus must be given once for each of 2 changes, "-" for an adapter, got 1'):
        listed_changes(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="scale must be given once for each of 1 changes, got 2"):
        listed_changes(["a"], None, [1.0, 2.0])
