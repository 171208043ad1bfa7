"""Weights that are read without a call of their module are refused."""

import pytest
import torch
import torch.nn.functional as F
from networks import data
from torch import nn

import hdrq


def test_a_weight_that_is_read_without_a_call_is_refused():
    class Subclass(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.bias, self.idle = nn.Linear(8, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)
            self.tied = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.qkv.weight, self.bias) + self.tied(x) + F.linear(x, self.tied.weight)

    x = data(9, 6, 5)
    for module, name, more in ((Subclass(8, 2), "1", " and 1 more"), (Reader(), "1.qkv", "")):
        model = nn.Sequential(nn.Linear(5, 8), module).eval()
        for bits in ("W4A4", {"*": "W4A4", name: "float"}):  # the first pattern decides
            with pytest.raises(
                ValueError, match=rf"must call its layers .* got '{name}'{more}, whose weights are read"
            ):
                hdrq.quantize(model, x, "rtn", bits=bits)
        hdrq.quantize(model, x, "rtn", bits={name: "float", "*": "W4A4"})
