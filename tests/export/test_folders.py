"""Folders of GPTQ, AWQ and compressed-tensors, made here from their published layouts, bit by bit."""

import json
import warnings

import pytest
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hdrq
from hdrq.checkpoint.format import Reader
from hdrq.cli import app
from hdrq.export.folders import Folder, read_folder, write_folder
from hdrq.merging.files import merge_files, readiness

N, K = 16, 32  # outputs and inputs of every layer
LAYERS = ("model.layers.0.q_proj", "model.layers.1.down_proj")
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ's order of the eight columns of a word


def words(values, bits):
    """Rows of integers as int32 words: one long number for each row, lowest bits first."""
    rows = []
    for row in values.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        parts = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append([part - 2**32 if part >= 2**31 else part for part in parts])
    return torch.tensor(rows, dtype=torch.int32)


def shuffled(values):
    """Columns as the nibbles of AWQ's words have them."""
    return values.reshape(len(values), -1, 8)[:, :, list(NIBBLES)].reshape(values.shape)


def layer(seed, bits=4, groups=4):
    """Codes from 0 on (N, K), zero points of 1 and more (N, groups), scales that float16 holds."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (N, K), generator=g)
    zeros = torch.randint(1, 2**bits, (N, groups), generator=g)
    return codes, zeros, (torch.rand((N, groups), generator=g) * 0.02 + 0.01).half()


def values(codes, zeros, scale, index=None):
    """The weight that is meant."""
    index = torch.arange(K) // (K // scale.shape[1]) if index is None else index
    return (codes - zeros[:, index]).float() * scale[:, index].float()


def gptq(seed, *, bits=4, groups=4, sym=False, v2=False, index=None):
    tensors, weights = {}, {}
    for number, name in enumerate(LAYERS):
        codes, zeros, scale = layer(10 * seed + number, bits, groups)
        zeros = torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
        own = torch.arange(K) // (K // groups) if index is None else index
        tensors |= {
            f"{name}.qweight": words(codes.t().t(), bits).t().contiguous(),
            f"{name}.qzeros": words((zeros - (0 if v2 else 1)).t(), bits),
            f"{name}.scales": scale.t().contiguous(),
            f"{name}.g_idx": own.to(torch.int32),
        }
        weights[name] = values(codes, zeros, scale, own)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": K // groups,
        "sym": sym,
        "desc_act": index is not None,
    }
    return tensors, weights, config | {"checkpoint_format": "gptq_v2" if v2 else "gptq"}


def awq(seed):
    tensors, weights = {}, {}
    for number, name in enumerate(LAYERS):
        codes, zeros, scale = layer(10 * seed + number)
        tensors |= {
            f"{name}.qweight": words(shuffled(codes.t()), 4),
            f"{name}.qzeros": words(shuffled(zeros.t()), 4),
            f"{name}.scales": scale.t().contiguous(),
        }
        weights[name] = values(codes, zeros, scale)
    config = {"quant_method": "awq", "bits": 4, "group_size": K // 4, "zero_point": True, "version": "gemm"}
    return tensors, weights, config


def compressed(seed, *, bits=4, groups=4, symmetric=True, form="pack-quantized", inputs=False):
    tensors, weights, half = {}, {}, 2 ** (bits - 1)
    for number, name in enumerate(LAYERS):
        codes, zeros, scale = layer(10 * seed + number, bits, groups)
        zeros = torch.full_like(zeros, half) if symmetric else zeros
        tensors[f"{name}.weight_scale"] = scale.float()
        if form == "pack-quantized":
            tensors[f"{name}.weight_packed"] = words(codes, bits)
            tensors[f"{name}.weight_shape"] = torch.tensor([N, K])
            if not symmetric:
                tensors[f"{name}.weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
        else:
            tensors[f"{name}.weight"] = (codes - half).to(torch.int8)
            if not symmetric:
                tensors[f"{name}.weight_zero_point"] = (zeros - half).to(torch.int8)
        if inputs:
            tensors[f"{name}.input_scale"] = torch.tensor([0.05 * (number + 1)])
            tensors[f"{name}.input_zero_point"] = torch.tensor([-3 - seed], dtype=torch.int8)
        weights[name] = values(codes, zeros, scale)
    strategy = "channel" if groups == 1 else "group"
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    args["group_size"] = None if groups == 1 else K // groups
    scheme = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    if inputs:
        scheme["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor"}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme}}
    return tensors, weights, config


KINDS = {
    "gptq": gptq,
    "gptq, symmetric": lambda seed: gptq(seed, sym=True),
    "gptq_v2": lambda seed: gptq(seed, v2=True),
    "gptq, 3 bits": lambda seed: gptq(seed, bits=3),
    "gptq, 8 bits, one group": lambda seed: gptq(seed, bits=8, groups=1),
    "gptq, act-order": lambda seed: gptq(seed, index=torch.arange(K) % 4),
    "awq": awq,
    "compressed": compressed,
    "compressed, 3 bits per channel": lambda seed: compressed(seed, bits=3, groups=1),
    "compressed, zero points": lambda seed: compressed(seed, symmetric=False),
    "compressed, W8A8": lambda seed: compressed(seed, bits=8, groups=1, form="int-quantized", inputs=True),
}


def folder(path, made, *, seed=0, shards=2, **config):
    """A folder with two shards, an index, a tokenizer and a tensor that is not quantized."""
    tensors, _, section = made
    tensors = {**tensors, "model.norm.weight": torch.linspace(0.5, 1.5, K).to(torch.bfloat16) + seed}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {**section, **config}}))
    (path / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    cut = [names[k::shards] for k in range(shards)]
    files = [f"model-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)]
    for file, own in zip(files, cut, strict=True):
        save_file({name: tensors[name].contiguous() for name in own}, path / file, metadata={"format": "pt"})
    index = {name: file for file, own in zip(files, cut, strict=True) for name in own}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def tensors_of(path):
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def dequantized(source, name):
    """The weight of a layer of a file or a folder, its columns in the order of the folder's."""
    facts = source.manifest["weights"][name]
    codes, scale = (source.tensor(f"{name}.weight.{part}") for part in ("codes", "scale"))
    codes = hdrq.ops.unpack(codes, facts["shape"], signed=True) if codes.dtype == torch.uint8 else codes
    zero = source.tensor(f"{name}.weight.zero_point").float() if facts.get("affine") else None
    where = {"axis": facts["axis"], "group_size": facts.get("group_size")}
    weight = hdrq.ops.dequantize(codes, scale, zero_point=zero, **where)
    if f"{name}.g_idx" in source.specs:
        order = source.tensor(f"{name}.g_idx").argsort(stable=True)
        weight = torch.empty_like(weight).index_copy_(1, order, weight)
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_written_again(kind, tmp_path):
    made = KINDS[kind](0)
    path = folder(tmp_path / "a", made)
    manifest = read_folder(path, tmp_path / "a.safetensors")
    assert manifest["origin"]["sha256"].keys() == {path.name for path in path.glob("*.safetensors")}
    with Reader(tmp_path / "a.safetensors") as file:
        for name, weight in made[1].items():
            assert_same_bits(dequantized(file, name) + 0.0, weight + 0.0)
    write_folder(tmp_path / "a.safetensors", path, tmp_path / "b")
    before, after = tensors_of(path), tensors_of(tmp_path / "b")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert_same_bits(after[name], value)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_folders_merge_as_their_files_do(kind, tmp_path):
    made = [KINDS[kind](seed) for seed in (0, 1)]
    paths = [folder(tmp_path / str(k), each, seed=k) for k, each in enumerate(made)]
    for k, path in enumerate(paths):
        read_folder(path, tmp_path / f"{k}.safetensors")
    report = merge_files(paths, tmp_path / "m", report=True, seed=3)
    merge_files([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "m.safetensors", seed=3)
    write_folder(tmp_path / "m.safetensors", paths[0], tmp_path / "again")
    merged, again = tensors_of(tmp_path / "m"), tensors_of(tmp_path / "again")
    for name, value in merged.items():
        assert_same_bits(value, again[name])
    assert merged["model.norm.weight"].dtype == torch.bfloat16
    with Folder(tmp_path / "m") as opened:
        for name in LAYERS:
            mean = (made[0][1][name] + made[1][1][name]) / 2
            step = opened.tensor(f"{name}.weight.scale").max()
            # Rounding takes half a step, near a tie one; a zero point that rounds one more; float16 little.
            assert (dequantized(opened, name) - mean).abs().max() < (1.0 + 0.6 * bool(opened.forms[name].affine)) * step
        parents = opened.manifest["models"]
        with Folder(paths[0]) as first:
            assert parents[0]["sha256"] == first.sha256()
        assert opened.manifest["merge"]["seed"] == 3
    assert readiness(paths, seed=3).as_dict() == report.as_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_folders_stand_for_their_weights(kind, tmp_path):
    made = KINDS[kind](0)
    for name, found in hdrq.integers(folder(tmp_path / "a", made)).items():
        where = {"zero_point": found.zero_point, "axis": found.axis, "group_size": found.group_size}
        weight = hdrq.ops.dequantize(found.codes, found.scale, **where)
        if found.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, found.order, weight)
        assert (found.order is not None) == (kind == "gptq, act-order")
        torch.testing.assert_close(weight, made[1][name], rtol=0, atol=0)


def test_inputs_of_a_merge_move(tmp_path):
    """Ranges with other zero points have their mean between them, and the folder says so."""
    paths = [folder(tmp_path / str(k), KINDS["compressed, W8A8"](k)) for k in range(2)]
    merge_files(paths, tmp_path / "m", weights=(0.0, 1.0))
    name = LAYERS[1]
    with Folder(tmp_path / "m") as file:
        assert file.manifest["inputs"][name] == [-124, 131]
        assert float(file.tensor(f"{name}.input.scale")) == pytest.approx(0.1)
    assert int(tensors_of(tmp_path / "m")[f"{name}.input_zero_point"]) == -4


def test_to_a_file_if_its_name_says_so_and_with_one(tmp_path):
    paths = [folder(tmp_path / str(k), awq(k)) for k in range(2)]
    read_folder(paths[1], tmp_path / "1.safetensors")
    merge_files([paths[0], tmp_path / "1.safetensors"], tmp_path / "m.safetensors")
    merge_files([paths[0], tmp_path / "1.safetensors"], tmp_path / "m")
    with Reader(tmp_path / "m.safetensors") as file, Folder(tmp_path / "m") as other:
        for name in LAYERS:
            torch.testing.assert_close(dequantized(file, name), dequantized(other, name), rtol=1e-3, atol=0)


def test_a_model_loads_what_was_read(tmp_path):
    """Weights of a folder in the architecture of torch; with act-order there is none that has them."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(K, dtype=torch.bfloat16)})
            layers = ({"q_proj": torch.nn.Linear(K, N, bias=False)}, {"down_proj": torch.nn.Linear(K, N, bias=False)})
            self.model["layers"] = torch.nn.ModuleList(torch.nn.ModuleDict(each) for each in layers)

        def forward(self, x):
            return self.model["layers"][0]["q_proj"](x)

    made = gptq(0)
    read_folder(folder(tmp_path / "a", made), tmp_path / "a.safetensors")
    model, x = hdrq.load(tmp_path / "a.safetensors", Net().eval()), torch.randn(3, K)
    assert_same_bits(model(x), torch.nn.functional.linear(x, made[1][LAYERS[0]]))
    read_folder(folder(tmp_path / "b", KINDS["gptq, act-order"](0)), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="g_idx unexpected"):
        hdrq.load(tmp_path / "b.safetensors", Net().eval())


def test_padded_words_of_older_versions(tmp_path):
    """Versions of 2024 put ten integers of 3 bits into a word."""
    tensors, weights, config = compressed(0, bits=3, groups=1)
    for name in LAYERS:
        codes, _, _ = layer(LAYERS.index(name), 3, 1)
        padded = torch.zeros(N, 40, dtype=torch.long)
        padded[:, :K] = codes
        tensors[f"{name}.weight_packed"] = torch.cat([words(part, 3) for part in padded.split(10, 1)], 1)
    path = folder(tmp_path / "a", (tensors, weights, config))
    with Folder(path) as file:
        assert_same_bits(dequantized(file, LAYERS[0]), weights[LAYERS[0]])
    read_folder(path, tmp_path / "a.safetensors")
    write_folder(tmp_path / "a.safetensors", path, tmp_path / "b")
    assert_same_bits(tensors_of(tmp_path / "b")[f"{LAYERS[0]}.weight_packed"], tensors[f"{LAYERS[0]}.weight_packed"])


def changed(made, **tensors):
    return {**made[0], **{f"{LAYERS[0]}.{name}": value for name, value in tensors.items()}}, *made[1:]


REFUSED = {
    "method": (gptq(0), {"quant_method": "bitsandbytes"}, "quant_method must be one of compressed-tensors, gptq"),
    "marlin": (gptq(0), {"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2, got"),
    "gemv": (awq(0), {"version": "gemv"}, "must be of version gemm, 4 bits, with zero points"),
    "rotated": (compressed(0), {"transform_config": {"config_groups": {"u": 1}}}, "transform_config must be empty"),
    "cache": (compressed(0), {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be empty to read"),
    "sparse": (compressed(0), {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config must be dense, got"),
    "float": (compressed(0), {"format": "float-quantized"}, "must be of integers, pack-quantized or int"),
    "groups": (compressed(0), {"config_groups": {"g": {"targets": ["re:.*other"]}}}, "must be a target of config"),
    "order": (changed(gptq(0), g_idx=torch.zeros(K, dtype=torch.int32)), {}, "must give every group 8 inputs"),
    "height": (changed(gptq(0), qweight=torch.zeros((5, N), dtype=torch.int32)), {}, "must hold 2, 3, 4 or 8 bits"),
    "scales": (changed(awq(0), scales=torch.ones((5, N))), {}, "must be of groups that divide 32 inputs, by 16, got"),
    "packed": (changed(compressed(0), weight_packed=torch.zeros((N, 3), dtype=torch.int32)), {}, "weight_packed must"),
    "shape": (changed(compressed(0), weight_scale=torch.ones(N, 5)), {}, "one of each output, or of groups of 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_folders_are_refused(case, tmp_path):
    made, config, message = REFUSED[case]
    path = folder(tmp_path / "a", made, **config)
    with pytest.raises(ValueError, match=message) as raised:
        read_folder(path, tmp_path / "a.safetensors")
    assert str(path) in str(raised.value)
    assert not (tmp_path / "a.safetensors").exists()


def test_damaged_folders_are_refused(tmp_path):
    path = folder(tmp_path / "a", gptq(0))
    shard = next(iter(sorted(path.glob("*.safetensors"))))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        Folder(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="must be there, since the index names it"):
        Folder(path)
    shard.write_bytes(whole)
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(ValueError, match="must name files beside it"):
        Folder(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        Folder(path)
    with pytest.raises(FileNotFoundError, match="path must be a folder that exists"):
        Folder(tmp_path / "none")


def test_what_two_models_must_share(tmp_path):
    first = folder(tmp_path / "0", gptq(0))
    others = {
        "g_idx": (KINDS["gptq, act-order"](1), "g_idx"),
        "groups": (gptq(1, groups=2), "weight group_size"),
        "bits": (gptq(1, bits=8), "weight range"),
        "symmetry": (gptq(1, sym=True), "zero_point"),
    }
    for name, (made, message) in others.items():
        path = folder(tmp_path / name, made)
        with pytest.raises(ValueError, match=f"models must be alike to be merged, got .*{message}"):
            merge_files([first, path], tmp_path / "m")
    index = torch.arange(K - 1, -1, -1) % 4
    paths = [
        folder(tmp_path / "order", gptq(0, index=torch.arange(K) % 4)),
        folder(tmp_path / "o", gptq(1, index=index)),
    ]
    with pytest.raises(ValueError, match=r"g_idx \(other integers in"):
        merge_files(paths, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".m")]


def test_values_that_are_not_what_the_configuration_says(tmp_path):
    tensors, weights, config = gptq(0)
    path = folder(tmp_path / "sym", (tensors, weights, config), sym=True)
    with pytest.raises(ValueError, match="qzeros must be 7 everywhere for a symmetric weight"):
        read_folder(path, tmp_path / "a.safetensors")
    path = folder(tmp_path / "wrapped", changed(gptq(0), qzeros=torch.full((4, 2), -1, dtype=torch.int32)))
    with pytest.raises(ValueError, match="must hold zero points of 1 to 15, got one that is 0 or 16"):
        read_folder(path, tmp_path / "a.safetensors")


def test_awq_that_scaled_channels_otherwise(tmp_path):
    """Models whose norms differ by r = 2 in half of the channels: these grow by (2 + ½ − 2)/4, an eighth."""
    paths = [folder(tmp_path / str(k), awq(k)) for k in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readiness(paths)
    factor = torch.ones(K)
    factor[::2] = 2
    made = awq(1)
    norm = torch.linspace(0.5, 1.5, K) * factor
    other = folder(tmp_path / "2", ({**made[0], "model.first_norm.weight": norm}, *made[1:]))
    first = awq(0)
    one = folder(tmp_path / "3", ({**first[0], "model.first_norm.weight": norm / factor}, *first[1:]))
    with pytest.warns(UserWarning, match=r"model\.first_norm\.weight differs so much .* change by 6% on average"):
        readiness([one, other])


def test_scales_that_float16_does_not_hold(tmp_path):
    paths = [folder(tmp_path / str(k), gptq(k)) for k in range(2)]
    read_folder(paths[0], tmp_path / "a.safetensors")
    large = changed(gptq(1), scales=torch.full((4, N), 6e4, dtype=torch.float16))
    with pytest.raises(ValueError, match=f"{LAYERS[0]}.scales must fit float16, got 1"):
        merge_files([folder(tmp_path / "x", large), paths[0]], tmp_path / "m", weights=(2, -1), extrapolate=True)
    assert not (tmp_path / "m").exists()


def test_what_is_there_is_kept(tmp_path):
    paths = [folder(tmp_path / str(k), awq(k)) for k in range(2)]
    before = {path: path.read_bytes() for path in paths[0].iterdir()}
    with pytest.raises(ValueError, match="out must be a new or an empty folder"):
        merge_files(paths, paths[0])
    assert {path: path.read_bytes() for path in paths[0].iterdir()} == before


def test_from_the_command_line(tmp_path):
    paths = [folder(tmp_path / str(k), awq(k)) for k in range(2)]
    run = CliRunner().invoke
    for k, path in enumerate(paths):
        result = run(app, ["import", str(path), "-o", str(tmp_path / f"{k}.safetensors")])
        assert result.exit_code == 0 and "2 quantized weights" in result.output.replace("\n", " ")
    files = [str(tmp_path / f"{k}.safetensors") for k in range(2)]
    assert run(app, ["merge", *files, "--force", "-o", str(tmp_path / "m.safetensors")]).exit_code == 0
    like = ["export", str(tmp_path / "m.safetensors"), "--like", str(paths[0]), "-o", str(tmp_path / "like")]
    assert run(app, like).exit_code == 0
    assert run(app, ["merge", *map(str, paths), "--force", "-o", str(tmp_path / "direct")]).exit_code == 0
    for name, value in tensors_of(tmp_path / "direct").items():
        assert_same_bits(tensors_of(tmp_path / "like")[name], value)
    told = run(app, ["inspect", str(tmp_path / "direct"), "--history"]).output
    assert told.startswith("merged: rule systematic") and told.count("read: kind awq") == 2
