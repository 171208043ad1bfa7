"""Changes, added to the integers of a folder of GPTQ."""

import json

import pytest
import torch
from merging.adding_models import (
    digest,
    net,
    product,
    quantized,
    save,
)
from networks import data
from safetensors.torch import save_file

from hdrq.checkpoint import format
from hdrq.export.folders import Folder
from hdrq.merging import add_file
from hdrq.merging.changes import Change
from hdrq.merging.weights import Weights


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
