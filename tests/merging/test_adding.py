"""Adapters and differences into quantized models: peft's layout, whole models, refusals, and what a file says."""

import hashlib
import json
import math

import pytest
import torch
from helpers import same, state
from networks import SAMPLES, Mergeable, data, mergeable
from safetensors.torch import save_file
from torch import nn

import hdrq
from hdrq.checkpoint import format
from hdrq.checkpoint.inspection import contents
from hdrq.checkpoint.saving import state_of
from hdrq.export.folders import Folder
from hdrq.merging import add, add_file
from hdrq.merging.changes import Change, listed_changes
from hdrq.merging.weights import Weights
from hdrq.quantizers.layers import quantized_layers

TOKENS = torch.randint(0, 11, (32, 5), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An embedding, linear layers of which one is square, and convolutions; the head stays in float."""

    def __init__(self, tie=False):
        super().__init__()
        self.embed, self.wide, self.square = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 12)
        self.conv, self.head = nn.Conv1d(12, 6, 3, padding=1), nn.Linear(6, 8)
        self.out = nn.Linear(8, 11, bias=False)
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = torch.relu(self.square(torch.relu(self.wide(self.embed(tokens)))))
        return self.out(self.head(torch.relu(self.conv(x.mT)).mT))


def net(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options).eval()


def quantized(seed=0, bits="W8A8", **options):
    bits = {"head": "float", "*": bits}
    return hdrq.quantize(net(seed), TOKENS, "rtn", bits=bits, attention=False, **options)


@pytest.fixture(scope="module")
def model():
    return quantized(per_channel=True)


@pytest.fixture
def file(model, tmp_path):
    hdrq.save(model, tmp_path / "q.safetensors")
    return tmp_path / "q.safetensors"


def factors(model, *names, rank=2, scale=0.05):
    """An adapter's tensors as peft names them, for layers of a model."""
    tensors = {}
    for k, name in enumerate(names):
        shape, key = tuple(model.get_submodule(name).weight.shape), f"base_model.model.{name}"
        a, b = data(rank, *shape[1:], seed=k) * scale, data(shape[0], rank, seed=k + 50)
        if isinstance(model.get_submodule(name), nn.Embedding):
            tensors |= {f"{key}.lora_embedding_A": data(rank, shape[0], seed=k) * scale}
            tensors |= {f"{key}.lora_embedding_B": data(shape[1], rank, seed=k + 50)}
        else:
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b.reshape(*b.shape, *(1 for _ in shape[2:]))}
    return tensors


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["wide"], "bias": "none", "lora_dropout": 0.1}


def adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def latents(model):
    return {name: layer.latent.detach() for name, layer in quantized_layers(model).items()}


def close(result, model, changes):
    """Whether every weight changed as it should, to a step where it is quantized."""
    for name, layer in quantized_layers(result).items():
        quantizer, latent = layer.weight_quantizer, layer.latent
        step = quantizer.broadcast(quantizer.scale, latent)
        want = latents(model)[name] + changes.get(f"{name}.weight".removeprefix("."), 0)
        want = want.clamp(step * quantizer.qmin, step * quantizer.qmax)
        assert ((latent - want).abs() < 1.001 * step).all(), name
    for name, value in result.state_dict().items():
        if "parametrizations" not in name and isinstance(value, torch.Tensor) and value.is_floating_point():
            want = model.state_dict()[name] + changes.get(name, 0)
            torch.testing.assert_close(value, want, rtol=0, atol=1e-6, msg=name)


def product(tensors, name, scale):
    a, b = tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"]
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:]) * scale


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


def save(model, path):
    hdrq.save(model, path)
    return path


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


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def code_shift(before, after):
    a, b = (m if isinstance(m, nn.Module) else hdrq.load(m, net()) for m in (before, after))
    quantizer = quantized_layers(a)["wide"].weight_quantizer
    return quantizer.codes(latents(b)["wide"]).int() - quantizer.codes(latents(a)["wide"]).int()


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


def words(values, axis):
    """4-bit numbers, eight to an int32, neighbours along an axis: the first in the lowest bits."""
    eights = values.long().movedim(axis, -1).unflatten(-1, (-1, 8))
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return ((packed + 2**31) % 2**32 - 2**31).to(torch.int32).movedim(-1, axis).contiguous()


def gptq_folder(folder, order, method="gptq"):
    """A folder as GPTQ writes it, 4 bits, groups of 8, act-order; and its weights."""
    folder.mkdir()
    outputs, inputs = 16, 32
    codes = torch.randint(4, 12, (inputs, outputs), generator=torch.Generator().manual_seed(1))
    zeros = torch.randint(4, 12, (4, outputs), generator=torch.Generator().manual_seed(2))
    scales = (torch.rand((4, outputs), generator=torch.Generator().manual_seed(3)) * 0.1 + 0.05).half()
    groups = torch.empty(inputs, dtype=torch.int32)
    groups[order] = (torch.arange(inputs) // 8).int()
    tensors = {"m.q.qweight": words(codes, 0), "m.q.qzeros": words(zeros - 1, 1), "m.q.scales": scales}
    tensors |= {"m.q.g_idx": groups, "m.embed.weight": data(9, 32).half()}
    save_file(tensors, folder / "model.safetensors")
    section = {"quant_method": method, "bits": 4, "group_size": 8, "desc_act": True, "sym": False}
    (folder / "config.json").write_text(json.dumps({"model_type": "m", "quantization_config": section}))
    return (codes - zeros[groups.long()]).float().T * scales[groups.long()].float().T


@pytest.mark.parametrize("order", [torch.arange(32), torch.arange(32).flip(0), torch.arange(32).view(8, 4).T.flatten()])
def test_an_adapter_goes_into_a_folder_of_gptq(order, tmp_path):
    """Columns of a group that are no neighbours take the change of their own inputs."""
    old, path = gptq_folder(tmp_path / "q", order), tmp_path / "q"
    tensors = {"m.q.lora_A.weight": data(2, 32) * 0.02, "m.q.lora_B.weight": data(16, 2, seed=1)}
    tensors |= {"m.embed.lora_embedding_A": data(2, 9), "m.embed.lora_embedding_B": data(32, 2, seed=1) * 0.1}
    change = product({f"base_model.model.{name}": value for name, value in tensors.items()}, "m.q", 1.0)
    report = add_file(path, Change(tensors, alpha=2), tmp_path / "out")
    with Folder(tmp_path / "out") as folder:
        result = Weights(folder)
        off = result.read("m.q.weight").rows(slice(None)).float() - old - change
        embedding = folder.tensor("m.embed.weight")
        assert folder.manifest["parent"]["sha256"] == {"model.safetensors": digest(path / "model.safetensors")}
    assert off.abs().max() < 0.16 and 0.8 < report.kept < 1.2
    assert (report.tensors[0].error, report.tensors[1].rule) == (
        pytest.approx(float(off.norm() / change.norm()), rel=1e-3),
        "float",
    )
    assert (embedding.float() - data(9, 32)).abs().max() > 0.05 and (tmp_path / "out" / "config.json").is_file()
    back = add_file(tmp_path / "out", Change(tmp_path / "q", minus=tmp_path / "out"), tmp_path / "back.safetensors")
    assert back.error < 1e-3
    with format.Reader(tmp_path / "back.safetensors") as file, Folder(path) as folder:
        assert torch.equal(file.tensor("m.q.weight.codes"), folder.tensor("m.q.weight.codes"))
    with pytest.raises(ValueError, match="model must be left out for a folder, got one for"):
        add_file(path, Change(tensors, alpha=2), None, model=net())


def test_folders_in_which_a_change_has_no_place_are_refused(tmp_path):
    gptq_folder(tmp_path / "q", torch.arange(32))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    embedding = {"m.embed.lora_embedding_A": data(2, 9), "m.embed.lora_embedding_B": data(32, 2)}
    with pytest.raises(ValueError, match="an embedding that is the head too"):
        add_file(tmp_path / "q", Change(embedding, alpha=2), None)
    lora = {"m.q.lora_A.weight": data(2, 32), "m.q.lora_B.weight": data(16, 2)}
    with format.Reader(save(quantized(), tmp_path / "file")) as file:
        manifest = {**file.manifest, "parent": {"models": [{"origin": {"kind": "awq"}}]}}
        with format.Writer(tmp_path / "awq", file.specs, manifest) as writer:
            for name in file.specs:
                writer.write(name, file.tensor(name))
    with pytest.raises(
        ValueError, match="got one made by AWQ, which scales their inputs: changes of other models do not"
    ):
        add_file(tmp_path / "awq", Change(lora, alpha=2), None)
    assert add_file(tmp_path / "awq", {"wide.weight": data(12, 8)}, None).tensors


TIED = {"quantized": {"*": "W8A8"}, "float": {"embed": "float", "out": "float", "*": "W8A8"}}


@pytest.mark.parametrize("bits", TIED.values(), ids=TIED)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_weight_that_layers_share_changes_once(bits, as_file, tmp_path):
    model = hdrq.quantize(net(tie=True), TOKENS, "rtn", bits=bits, attention=False)
    hdrq.save(model, tmp_path / "q")

    def added(change):
        if not as_file:
            return add(model, change).model
        add_file(tmp_path / "q", change, tmp_path / "out")
        return hdrq.load(tmp_path / "out", net(tie=True))

    delta = data(11, 8) * 0.05
    results = [
        added({name: delta for name in names})
        for names in (["embed.weight"], ["out.weight"], ["embed.weight", "out.weight"])
    ]
    assert all(same(state(result), state(results[0])) for result in results)
    close(results[0], model, {"embed.weight": delta, "out.weight": delta})
    assert not torch.equal(results[0].embed.weight, model.embed.weight)
    assert torch.equal(results[0].embed.weight, results[0].out.weight)
    with pytest.raises(ValueError, match=r"must be for weights of one layer each, got out\.weight \(.*embed\.weight"):
        added(Change(factors(model, "out"), alpha=1))
    if bits is TIED["quantized"]:
        with pytest.raises(ValueError, match=r"changes of embed\.weight must be one for all layers that share it"):
            added({"embed.weight": delta, "out.weight": 2 * delta})


def test_a_norm_that_was_never_trained_is_no_folded_one():
    model = hdrq.quantize(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)).eval(), data(16, 3, 8, 8), "rtn")
    assert add(model, Change(factors(model, "1", scale=0.01), alpha=1)).report.tensors[0].name == "1.weight"


class Twice(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def test_a_weight_that_two_layers_read_has_no_one_input():
    model = hdrq.quantize(Twice().eval(), data(32, 6), "rtn", bits={"*": "W8A8"})
    with pytest.warns(UserWarning, match=r"rule calibrated could not serve one\.weight \(systematic\)"):
        (row,) = add(
            model, {"one.weight": data(6, 6) * 0.01}, rule="calibrated", calibration=data(32, 6)
        ).report.tensors
    assert row.rule == "systematic" and row.input_error is None


BATCHNORM = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()


def test_weights_into_which_batchnorm_is_folded(tmp_path):
    BATCHNORM[1].running_var.fill_(4.0)
    model = hdrq.quantize(BATCHNORM, data(16, 3, 8, 8), "rtn", bits="W8A8")
    assert add(model, Change(factors(model, "3"), alpha=1)).report.kept > 0.5
    with pytest.raises(
        ValueError, match=r"for weights as they were trained, got 0\.weight \(of 1\), into which BatchN"
    ):
        add(model, Change(factors(model, "0"), alpha=1))
    with pytest.raises(ValueError, match="with the BatchNorms folded that the model has folded, got 1; give states"):
        add(model, Change(BATCHNORM.state_dict(), minus=BATCHNORM.state_dict()))
    other = hdrq.load(save(model, tmp_path / "q"), BATCHNORM)
    other[3].bias.data.add_(0.5)
    found = add(model, Change(save(other, tmp_path / "b"), minus=tmp_path / "q"))
    assert [row.name for row in found.report.tensors] == ["3.bias"]
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    plain = hdrq.quantize(plain, data(16, 3, 8, 8), "rtn")
    with pytest.raises(ValueError, match="with the BatchNorms folded that the model has folded, got others"):
        add(model, Change(save(plain, tmp_path / "p"), minus=tmp_path / "p"))


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm has them: its factor is folded, and it keeps its place."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def test_a_norm_that_keeps_its_place_is_known_by_its_statistics():
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), NormAct(5), nn.Conv2d(5, 4, 3)).eval()
    plain[1].running_var.fill_(4.0)
    model = hdrq.quantize(plain, data(16, 3, 8, 8), "rtn", bits="W8A8")
    assert 0.99 < model[1].running_var[0] < 1
    with pytest.raises(ValueError, match=r"got 0\.weight \(it may be of 1\); .*|0\.weight \(it may be of 1\)"):
        add(model, Change(factors(model, "0"), alpha=1))
    with pytest.raises(ValueError, match="with the BatchNorms folded that the model has folded, got 1"):
        add(model, Change(plain.state_dict(), minus=plain.state_dict()))


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
