"""LoRA adapters, added to a quantized model: the change that peft makes, or a refusal by name."""

import json
import math

import pytest
import torch
from helpers import same, state
from merging.adding_models import (
    TOKENS,
    Net,
    adapter,
    close,
    factors,
    net,
    product,
)
from networks import data
from torch import nn

import hdrq
from hdrq.merging import add, add_file
from hdrq.merging.changes import Change


def test_an_adapter_goes_into_codes_and_into_what_stays_in_float(model, tmp_path):
    tensors = factors(model, "wide", "square", "conv", "head", "embed", scale=0.01)
    found = add(model, adapter(tmp_path / "lora", tensors))
    want = {f"{name}.weight": product(tensors, name, 1.5) for name in ("wide", "square", "conv", "head")}
    embedding = [tensors[f"base_model.model.embed.lora_embedding_{x}"] for x in "BA"]
    want["embed.weight"] = (embedding[0] @ embedding[1]).T * 1.5
    close(found.model, model, want)
    rows = {tensor.name: tensor for tensor in found.report.tensors}
    assert rows.keys() == want.keys() and rows["head.weight"].rule == "float"
    for name, row in rows.items():
        assert row.change == pytest.approx(float(want[name].norm()), rel=1e-5)
    assert 0.9 < found.report.kept < 1.1 and 0 < found.report.error < 1 and type(found.model) is Net
    assert found.model(TOKENS).isfinite().all()


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"use_rslora": True}, {"wide": 3 / math.sqrt(2), "square": 3 / math.sqrt(2)}),
        ({"alpha_pattern": {"squ.re": 8}}, {"wide": 1.5, "square": 4.0}),
        ({"alpha_pattern": {"are": 8, "wide": 1}}, {"wide": 0.5, "square": 1.5}),
        ({"r": 4, "rank_pattern": {"wide|square": 2}}, {"wide": 1.5, "square": 1.5}),
    ],
)
def test_scales_are_those_of_peft(config, scales, model, tmp_path):
    tensors = factors(model, "wide", "square")
    rows = add(model, adapter(tmp_path / "lora", tensors, **config)).report.tensors
    for row in rows:
        name = row.name.removesuffix(".weight")
        assert row.change == pytest.approx(float(product(tensors, name, scales[name]).norm()), rel=1e-5)


def test_forms_of_one_adapter_give_the_same_codes(model, tmp_path):
    tensors = factors(model, "wide", "conv")
    want = state(add(model, adapter(tmp_path / "lora", tensors)).model)
    torch.save(tensors, tmp_path / "lora.bin")
    named = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    halves = {name: value.bfloat16() for name, value in tensors.items()}
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    (old / "adapter_config.json").write_text((tmp_path / "lora" / "adapter_config.json").read_text())
    torch.save(tensors, old / "adapter_model.bin")
    for form in (
        tmp_path / "lora" / "adapter_model.safetensors",  # its config lies beside it
        old,
        Change(tmp_path / "lora.bin", alpha=3),
        Change(tensors, alpha=3),
        Change(named, alpha=3),
        Change(plain, alpha=1.5, scale=2),
        [Change(tensors, alpha=1), Change(tensors, alpha=2)],
    ):
        assert same(state(add(model, form).model), want)
    assert not same(state(add(model, Change(halves, alpha=3)).model), want)


def test_a_bias_of_lora_b_is_added_as_well(model, tmp_path):
    tensors = factors(model, "wide") | {"base_model.model.wide.lora_B.bias": data(12)}
    found = add(model, adapter(tmp_path / "lora", tensors, lora_bias=True))
    torch.testing.assert_close(found.model.wide.bias, model.wide.bias + 1.5 * data(12))
    with pytest.raises(ValueError, match=r"must be for layers of the model, got out\.bias, which it does not have"):
        add(model, Change(factors(model, "out") | {"base_model.model.out.lora_B.bias": data(11)}, alpha=1))


def test_the_embedding_that_peft_saves_beside_its_adapter_is_the_models_own(model, tmp_path):
    tensors = factors(model, "embed")
    more = tensors | {"base_model.model.embed.base_layer.weight": data(11, 8)}
    want = add(model, Change(tensors, alpha=2)).model
    assert same(state(add(model, Change(more, alpha=2)).model), state(want))


class Turned(nn.Module):
    """Layers of GPT-2, whose weights have their inputs along the first axis, and one of torch's."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.square, self.linear = kind(12, 8), kind(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.linear(self.square(self.first(x)))


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_with_inputs_along_the_first_axis_take_the_transposed_product(per_channel, tmp_path):
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    float_model = Turned(kind).eval()
    model = hdrq.quantize(float_model, data(64, 8), "rtn", bits="W8A8", per_channel=per_channel)
    tensors = {}
    for name, (rows, columns) in {"first": (12, 8), "square": (12, 12), "linear": (12, 12)}.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = data(2, columns, seed=1) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = data(rows, 2, seed=2)
    path = adapter(tmp_path / "lora", tensors, fan_in_fan_out=True)
    changes = {f"{name}.weight": product(tensors, name, 1.5) for name in ("first", "square", "linear")}
    want = {name: change if name == "linear.weight" else change.T for name, change in changes.items()}
    close(add(model, path).model, model, want)
    hdrq.save(model, tmp_path / "q")
    if per_channel:
        add_file(tmp_path / "q", path, tmp_path / "out")
    else:  # nothing in the file says how square weights lie
        with pytest.raises(
            ValueError, match=r"model must be given for .*lora, got none: layers of it have their inputs"
        ):
            add_file(tmp_path / "q", path, tmp_path / "out")
        add_file(tmp_path / "q", path, tmp_path / "out", model=float_model)
    assert same(state(hdrq.load(tmp_path / "out", float_model)), state(add(model, path).model))


REFUSED = {
    "dora": ({"use_dora": True}, {}, "must add to weights and do nothing else, got use_dora=True; merge it into"),
    "bias": ({"bias": "all"}, {}, "must add to weights and do nothing else, got bias='all'"),
    "modules": ({"modules_to_save": ["out"]}, {}, r"got modules_to_save=\['out'\]"),
    "unknown": ({"use_new_thing": 1}, {}, "got use_new_thing=1"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights of .* must be one that leaves the model's"),
    "kind": ({"peft_type": "LOHA"}, {}, "peft_type of .* must be \"LORA\", got 'LOHA'"),
    "rank": ({"r": 4}, {}, "lora_A of wide must have the rank that .* says, 4, got 2"),
    "alpha": ({"lora_alpha": "x"}, {}, "alpha of wide in .* must be a number, got str"),
    "magnitude": ({}, {"base_model.model.wide.lora_magnitude_vector": data(12)}, "must hold lora_A and lora_B of one"),
    "saved": ({}, {"base_model.model.out.weight": data(11, 8)}, "nothing else, got base_model.model.out.weight; merge"),
    "half": ({}, {"base_model.model.conv.lora_A.weight": data(2, 12, 3)}, "lora_A and lora_B of every layer, got one"),
    "strange": ({}, factors(net(), "square") | {"x.lora_A.weight": data(2, 3), "x.lora_B.weight": data(4, 2)},
                r"must be for layers of the model, got x\.weight, which it does not have; it has"),
    "shape": ({}, {"square.lora_A.weight": data(2, 7), "square.lora_B.weight": data(12, 2)},
              r"must make a change of square\.weight, \(12, 12\), got \(2, 7\) and \(12, 2\)"),
    "nan": ({}, {"base_model.model.wide.lora_A.weight": torch.full((2, 8), torch.nan)}, "must be finite, got 16 of 16"),
    "several": ({}, {"wide.lora_A.b.weight": data(2, 8), "wide.lora_B.b.weight": data(12, 2)}, "factors of 2 adapters"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_do_more_are_refused(config, tensors, message, model, file, tmp_path):
    path = adapter(tmp_path / "lora", {**factors(model, "wide"), **tensors}, **config)
    with pytest.raises((TypeError, ValueError), match=message):
        add_file(file, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"wide": 4}}, {"lora_bias": True}], ids=str
)
def test_changes_are_those_that_peft_makes(options, model, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["wide", "square", "conv", "head", *([] if "lora_bias" in options else ["embed"])]
    config = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=3, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(net(), config)
    adapted.save_pretrained(tmp_path / "lora")
    merged, plain = adapted.merge_and_unload().state_dict(), net().state_dict()
    found = add(model, [tmp_path / "lora", Change(plain, minus=merged)])  # there and back
    assert all(row.change < 1e-5 for row in found.report.tensors)
    assert len(add(model, tmp_path / "lora").report.tensors) == len(targets) * (2 if "lora_bias" in options else 1)
