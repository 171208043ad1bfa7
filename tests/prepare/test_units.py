"""Units of reconstruction are the smallest blocks, in the order in which they run."""

import pytest
from networks import Block, data, lively
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.layers import input_quantizers


def test_blocks_of_the_demo_are_stem_six_residual_blocks_head():
    pytest.importorskip("safetensors")
    pytest.importorskip("PIL")
    from hdrq.demo.model import resnet

    model, x = resnet().eval(), data(2, 3, 32, 32)
    assert find_blocks(model, lambda m: m(x)) == ["stem.0", *(f"blocks.{i}" for i in range(6)), "head"]


def test_blocks_come_in_execution_order_and_unreached_ones_not_at_all():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(4, 4)
            self.late, self.early = Block(), Block()
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.late(self.early(self.stem(x)))

    x = data(2, 3, 6, 6)
    assert find_blocks(Backwards().eval(), lambda m: m(x)) == ["stem", "early", "late"]


def test_module_without_a_layer_that_runs_is_no_block():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

        def forward(self, x):
            return self.two(self.one(x, x, x)[0], x, x)[0]

    model, x = nn.Sequential(nn.Linear(5, 8), Attention(), Attention()).eval(), data(9, 6, 5)
    assert find_blocks(model, lambda m: m(x)) == ["0"]  # attention calls its projections' weights, not the modules
    kept = hdrq.quantize(model, x, "rtn", bits={"1": "float", "2": "float", "0": "W4A4"})
    assert list(input_quantizers(kept)) == ["0"]


def test_nested_blocks_are_the_smallest():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.inner(x)

    model, x = nn.Sequential(Stage(), Stage()).eval(), data(2, 4, 6, 6)
    assert find_blocks(model, lambda m: m(x)) == ["0.inner.0", "0.inner.1", "1.inner.0", "1.inner.1"]


def test_a_model_that_is_one_layer_is_a_unit_and_is_learned():
    layer, x = lively(nn.Linear(16, 8)), data(64, 16)
    learned = hdrq.quantize(layer, x, "hdrq", bits={"*": "W3A8"}, distance=0, iterations=200, progress=False)
    (block,) = report_of(learned).blocks
    assert block.name == "" and block.loss_after < block.loss_before
