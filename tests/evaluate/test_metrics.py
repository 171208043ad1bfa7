"""Which tensor of an output is measured."""

import pytest
import torch

from hdrq.evaluate.metrics import logits_of


def test_logits_come_before_a_loss():
    logits = torch.randn(2, 3)
    assert logits_of({"loss": torch.tensor(1.0), "logits": logits}, "output") is logits
    assert logits_of((logits, torch.tensor(1)), "output") is logits


def test_an_output_without_floats_is_named():
    for output in (None, torch.arange(3), {"logits": None}):
        with pytest.raises(ValueError, match="output of block a must hold a floating-point tensor"):
            logits_of(output, "output of block a")
