"""Folders of compressed-tensors that transformers reads: what hdrq writes, and what it merges of them."""

import json

import pytest
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file
from typer.testing import CliRunner

import hdrq
from hdrq.cli import app
from hdrq.export.folders import Folder, read_folder, to_compressed_tensors
from hdrq.merging.files import merge_files
from hdrq.quantizers.layers import quantized_layers

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(48).view(8, 6) % 40


def llama(seed=0):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def quantized(bits, seed=0, **options):
    bits = {"*embed*": "float", "lm_head": "float", "*": bits}
    options = {"activation_placement": "input", "attention": False, "progress": False, **options}
    return hdrq.quantize(llama(seed), [{"input_ids": TOKENS}], "rtn", bits=bits, **options)


def read(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("bits", ["W8A8", "W4A8", "W3A4"])
@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"group_size": 16}])
def test_transformers_gives_hdrqs_answers(bits, options, tmp_path):
    """To the last bit: its modules quantize inputs and weights in float as hdrq does."""
    model = quantized(bits, **options)
    section = to_compressed_tensors(model, tmp_path / "a")
    assert section["format"] == ("int-quantized" if bits == "W8A8" else "pack-quantized")
    assert_same_bits(logits(read(tmp_path / "a")), logits(model))


def test_weights_alone(tmp_path):
    model = quantized("W4A8", group_size=32)
    section = to_compressed_tensors(model, tmp_path / "a", activations="drop")
    assert section["config_groups"]["group_0"]["input_activations"] is None
    plain = llama()
    for name, layer in quantized_layers(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.latent)
    assert_same_bits(logits(read(tmp_path / "a")), logits(plain))


def test_tensors_that_are_too_much_for_one_file_lie_in_several(tmp_path, monkeypatch):
    model, most = quantized("W4A8"), 12_000
    to_compressed_tensors(model, tmp_path / "whole")
    monkeypatch.setattr("hdrq.export.folders.compressed.LARGEST_SHARD", most)
    to_compressed_tensors(model, tmp_path / "a")
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    count = len(shards)
    assert count > 1 and shards == [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    held = {name: shard for shard in shards for name in load_file(tmp_path / "a" / shard)}
    assert index["weight_map"] == held == dict.fromkeys(load_file(tmp_path / "whole" / "model.safetensors")) | held
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "a" / shard).values()) for shard in shards]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= most
    assert_same_bits(logits(read(tmp_path / "a")), logits(model))


def test_folders_merge_and_load(tmp_path):
    models = [quantized("W4A8", seed, group_size=16) for seed in range(2)]
    for k, model in enumerate(models):
        to_compressed_tensors(model, tmp_path / str(k))
    merge_files([tmp_path / "0", tmp_path / "1"], tmp_path / "m", seed=5)
    assert_same_bits(logits(read(tmp_path / "m")), logits(hdrq.merge(models, seed=5)))
    manifest = read_folder(tmp_path / "0", tmp_path / "0.safetensors")
    assert manifest["recipe"]["name"] == "rtn"  # the folder's own history is kept
    with Folder(tmp_path / "m") as file:
        assert [parent["recipe"]["group_size"] for parent in file.manifest["models"]] == [16, 16]


def test_from_the_command_line(tmp_path):
    """A file and an architecture make the folder that the model itself makes."""
    model = quantized("W4A8")
    hdrq.save(model, tmp_path / "q.safetensors")
    place = ["--model", "export.test_compressed_tensors:llama", "--to", "compressed-tensors"]
    result = CliRunner().invoke(app, ["export", str(tmp_path / "q.safetensors"), "-o", str(tmp_path / "a"), *place])
    assert result.exit_code == 0, result.output
    assert_same_bits(logits(read(tmp_path / "a")), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bits": {"*": "W4A8"}},
            r"layers must be linear, with a weight of their own, got model\.embed_tokens \(Embedding\)",
        ),
        (
            {"bits": {"*embed*": "float", "*": "W4A8"}, "attention": True},
            "are quantized, for which compressed-tensors has no place; quantize with",
        ),
        ({"bits": {"*embed*": "float", "*": "W4A16"}}, "input of .* must have at most 8 bits, got 16"),
        ({"bits": {"*embed*": "float", "*": "W12A8"}}, "weights must be signed, of 8 bits or less, got model"),
    ],
)
def test_what_the_format_has_no_place_for(change, message, tmp_path):
    options = {"activation_placement": "input", "attention": False, "progress": False, **change}
    model = hdrq.quantize(llama(), [{"input_ids": TOKENS}], "rtn", **options)
    with pytest.raises(ValueError, match=message):
        to_compressed_tensors(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
