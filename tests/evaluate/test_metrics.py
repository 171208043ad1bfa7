"""Which tensor of an output is measured."""

import pytest
import torch

from hdrq.evaluate.metrics import first_tensor


def test_logits_come_before_a_loss():
    logits = torch.randn(2, 3)
    assert first_tensor({"loss": torch.tensor(1.0), "logits": logits}, "output") is logits
    assert first_tensor((logits, torch.tensor(1)), "output") is logits


def test_an_output_without_floats_is_named():
    for output in (None, torch.arange(3), {"logits": None}):
        with pytest.raises(ValueError, match="output of block a must hold a floating-point tensor"):
            first_tensor(output, "output of block a")
