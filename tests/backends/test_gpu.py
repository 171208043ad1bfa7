"""What only a GPU shows: a whole step without a synchronisation, captured in a CUDA graph."""

import pytest
import torch
from helpers import assert_same_bits
from torch.nn import functional

import hdrq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
RANGES = [(-8, 7)] * 4
SHAPES = [(64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (256, 256, 1, 1)]  # a bottleneck of ResNet-50


class Step:
    """Quantizers of weights and activations of a bottleneck, forward and backward; the noise advances."""

    def __init__(self):
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape, scale=1.0):
            return torch.randn(shape, generator=generator, device="cuda") * scale

        self.sources = [normal(*shape, scale=0.05) for shape in SHAPES]
        self.weights = [(w + 0.01 * torch.randn_like(w)).requires_grad_() for w in self.sources]
        self.scales = [torch.full((1,), 0.02, device="cuda", requires_grad=True) for _ in SHAPES]
        self.steps = [torch.full((1,), 0.2, device="cuda", requires_grad=True) for _ in range(3)]
        self.rngs = [hdrq.rng_state(1, stream, device="cuda") for stream in range(7)]
        self.x, self.target = normal(8, 256, 14, 14), normal(8, 256, 14, 14)
        self.leaves = [*self.weights, *self.scales, *self.steps]
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)
        self.loss = torch.zeros((), device="cuda")

    def activation(self, x, k):
        return hdrq.ops.fake_quantize(x, self.steps[k], -8, 7, keep=0.5, rng=self.rngs[4 + k])

    def __call__(self):
        for leaf in self.leaves:
            leaf.grad.zero_()
        (a, b, c, d), distances = hdrq.ops.quantize_weights(
            self.weights, self.scales, RANGES, sources=self.sources, rngs=self.rngs[:4]
        )
        x = self.activation(self.x, 0)
        y = self.activation(functional.conv2d(x, a).relu(), 1)
        y = self.activation(functional.conv2d(y, b, padding=1).relu(), 2)
        y = functional.conv2d(y, c) + functional.conv2d(x, d)
        loss = (y - self.target).square().sum(1).mean() + 0.05 * distances.sum()
        loss.backward()
        self.loss.copy_(loss.detach())
        for rng in self.rngs:
            rng[2] += 1


def test_a_step_is_captured_and_its_noise_advances_at_each_replay():
    torch.backends.cudnn.deterministic = True
    eager, captured = Step(), Step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        captured()  # compiles
        for rng in captured.rngs:
            rng[2] = 0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    losses = []
    for _ in range(3):
        eager()
        graph.replay()
        losses.append(eager.loss.item())
        torch.testing.assert_close(captured.loss, eager.loss)
        for got, want in zip(captured.leaves, eager.leaves, strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)
        for got, want in zip(captured.rngs, eager.rngs, strict=True):
            assert_same_bits(got, want)
    assert len(set(losses)) == 3  # other noise each time


def test_a_step_reads_nothing_on_the_host():
    step = Step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
