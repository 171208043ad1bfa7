"""States in full precision as others write them: shards, folders, prefixes."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hdrq.checkpoint.float_states import _without_prefix, read_state


def test_shards_are_read_from_index_and_folder(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    for write, shard, index in (
        (save_file, "{}.safetensors", "model.safetensors.index.json"),
        (torch.save, "{}.bin", "pytorch_model.bin.index.json"),
    ):
        folder = tmp_path / index
        folder.mkdir()
        for name, value in state.items():
            write({name: value}, folder / shard.format(name))
        (folder / index).write_text(json.dumps({"weight_map": {name: shard.format(name) for name in state}}))
        for path in (folder, folder / index):
            assert all(torch.equal(read_state(path)[name], value) for name, value in state.items())


def test_what_is_no_state_is_named(tmp_path):
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"w": "../w.safetensors"}}))
    (tmp_path / "b.pth").write_bytes(b"nothing")
    for name in ("a.index.json", "b.pth", ""):
        with pytest.raises(ValueError, match=f"weights must be .*{name}"):
            read_state(tmp_path / name)


def test_a_prefix_of_wrappers_is_taken_off_with_a_word():
    state = nn.Linear(3, 2).state_dict()
    with pytest.warns(UserWarning, match="prefix"):
        found = _without_prefix({f"module._orig_mod.{k}": v for k, v in state.items()}, state, "w")
    assert found.keys() == state.keys()
