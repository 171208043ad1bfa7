"""What calibration data may be, and what is said of data that it may not be."""

import itertools

import pytest
import torch
from torch import nn

from hdrq.calibrate import data
from hdrq.calibrate.data import Call, calibration_calls, check_call, run_all


def test_scalars_and_single_rows_belong_to_all_samples():
    batch = {"time": torch.tensor(3), "x": torch.randn(8, 2), "row": torch.ones(1, 2)}
    (call,) = calibration_calls([batch])
    assert call.size == 8
    part = call.at(torch.tensor([1, 5]))
    assert torch.equal(part.kwargs["x"], batch["x"][[1, 5]])
    assert part.kwargs["time"] is batch["time"] and part.kwargs["row"] is batch["row"]


def test_other_lengths_are_refused_by_name():
    with pytest.raises(ValueError, match=r"batch 0 of calibration .* got 3 in mask and 8 in another"):
        calibration_calls([{"x": torch.randn(8, 2), "mask": torch.ones(3)}])
    with pytest.raises(ValueError, match="got a scalar in batch 0"):
        calibration_calls([torch.tensor(1.0)])


def test_a_loader_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(data, "SAMPLES", 64)
    with pytest.raises(ValueError, match="calibration must end"):
        calibration_calls(torch.randn(8, 2) for _ in itertools.count())
    with pytest.raises(ValueError, match="calibration must end"):
        calibration_calls(torch.randn(0, 2) for _ in itertools.count())
    assert len(calibration_calls([torch.randn(8, 2)] * 20)) == 20  # a list says how long it is


def test_a_loader_with_labels_is_told_what_a_batch_is():
    (call,) = calibration_calls([(torch.randn(8, 2), torch.ones(8))])
    with pytest.raises(TypeError, match=r"calibration must be .* got model\(Tensor, Tensor\).*images alone"):
        check_call(nn.Linear(2, 2), call)


def test_a_call_is_moved_to_the_model_and_kept_where_it_was():
    """A calibration set may be larger than the device that the model is on."""
    call = Call((torch.randn(4, 6),), {"flag": True, "scale": torch.tensor(2.0)})

    class Scaled(nn.Linear):
        def forward(self, x, flag, scale):
            assert flag and x.device == scale.device == self.weight.device
            return super().forward(x) * scale

    assert call(Scaled(6, 3)).device.type == "cpu"
    assert call(Scaled(6, 3).to("meta")).device.type == "meta"  # stands for a GPU
    assert {t.device.type for t in call.tensors} == {"cpu"}


def test_arguments_may_hold_tensors_inside():
    batch = {"x": torch.randn(8, 2), "more": [torch.randn(8, 3), "text"], "one": torch.ones(1)}
    (call,) = calibration_calls([(batch, 3)])
    part = call.at(torch.tensor([1, 5]))
    assert (call.size, part.size, str(part)) == (8, 2, "dict of (2, 2) float32, (2, 3) float32, (1,) float32, int")
    assert torch.equal(part.args[0]["more"][0], batch["more"][0][[1, 5]]) and part.args[0]["more"][1] == "text"
    with pytest.raises(ValueError, match="got 3 in argument 0 and 8 in another"):
        calibration_calls([([torch.randn(8, 2), torch.ones(3)],)])


def test_a_forward_may_write_to_what_it_is_called_with():
    class Writing(nn.Linear):
        def forward(self, batch):
            batch["x"].sub_(1)
            batch["y"] = super().forward(batch.pop("x"))
            return batch["y"]

    x = torch.randn(8, 2)
    before, (call,) = x.clone(), calibration_calls([({"x": x},)])
    model = Writing(2, 3)
    assert torch.equal(call(model), call(model)) and torch.equal(x, before)


def test_tensors_of_other_kinds_are_refused():
    holder = type("Holder", (), {"__init__": lambda self, x: setattr(self, "x", x)})
    for value, message in (
        (torch.eye(4).to_sparse(), "must have dense tensors, got one of layout sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "must have dense tensors, got a nested one"),
        (holder(torch.ones(4)), "must have tensors in lists, .* got a Holder that holds some"),
    ):
        with pytest.raises(TypeError, match=f"batch 0 of calibration {message}"):
            calibration_calls([(torch.ones(4, 2), value)])
    assert calibration_calls([(torch.ones(4, 2), holder("text"))])[0].size == 4


def test_an_error_of_the_first_run_names_the_data():
    run = run_all([Call((torch.randn(4, 5),), {})], "model must run on calibration")
    with pytest.raises(
        ValueError, match=r"model must run on calibration, got RuntimeError from model\(\(4, 5\) float32"
    ):
        run(nn.Linear(6, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(nn.Linear(6, 3))  # hooks may raise in later runs
