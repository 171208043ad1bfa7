"""State dicts: what differs between two, name by name."""

import torch
from checkpoint.example import quantized
from torch import nn

import hdrq
from hdrq.checkpoint.states import plain_state, state_differences


def test_differences_are_names_shapes_and_where_asked_for_dtypes():
    wanted = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "e": torch.zeros(())}
    state = {"e": torch.zeros(()), "b": torch.zeros(3), "c": torch.zeros(2).half(), "d": torch.zeros(2)}
    names = ["a missing", "b (3,), not (2,)", "d unexpected"]
    assert state_differences(state, wanted, dtypes=False) == names
    assert state_differences(state, wanted, dtypes=True) == [
        "a missing",
        "b ((3,), torch.float32), not ((2,), torch.float32)",
        "c ((2,), torch.float16), not ((2,), torch.float32)",
        "d unexpected",
    ]
    assert state_differences(wanted, wanted, dtypes=True) == []


class Versioned(nn.Linear):
    """Reads states of its own version alone, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_states_are_of_the_models_version(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4), Versioned(4, 4)).eval(), torch.randn(8, 4)
    made = hdrq.quantize(model, x, "rtn")
    hdrq.save(made, tmp_path / "q.safetensors")
    for other in (hdrq.load(tmp_path / "q.safetensors", model), hdrq.merge([made, made])):
        assert torch.equal(other(x), made(x))


def test_the_plain_state_is_what_quantizers_do_not_hold():
    names = set(plain_state(quantized()))
    assert "4.bias" in names and not any("parametrizations" in name or "quantizer" in name for name in names)
