"""QDrop's mixing, in Triton. Definition: :mod:`hdrq.backends.reference.drop`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import drops, launch, tiling


@triton.jit(do_not_specialize=["threshold"])
def drop_mix_kernel(y, a, b, threshold, rng, numel, BLOCK: tl.constexpr):
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    kept, other = tl.load(a + start + i, mask=live), tl.load(b + start + i, mask=live)
    tl.store(y + start + i, tl.where(lang.kept(rng, threshold, start, BLOCK), kept, other), mask=live)


@triton.jit(do_not_specialize=["threshold"])
def drop_mix_backward_kernel(grad_a, grad_b, grad, threshold, rng, numel, BLOCK: tl.constexpr):
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    g = tl.load(grad + start + i, mask=live)
    kept = lang.kept(rng, threshold, start, BLOCK)
    zero = tl.zeros_like(g)
    tl.store(grad_a + start + i, tl.where(kept, g, zero), mask=live)
    tl.store(grad_b + start + i, tl.where(kept, zero, g), mask=live)


def drop_mix(a, b, threshold, rng) -> torch.Tensor:
    if not drops(threshold):  # which has no bound in a word
        return a.clone()
    y = torch.empty_like(a)
    if a.numel() > 0:
        t = tiling(a, None)
        launch(drop_mix_kernel, t.count, a, y, a, b, threshold, rng, t.numel, block=t.block)
    return y


def drop_mix_backward(grad, threshold, rng) -> tuple[torch.Tensor, torch.Tensor]:
    if not drops(threshold):
        return grad.clone(), torch.zeros_like(grad)
    grad_a, grad_b = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel() > 0:
        t = tiling(grad, None)
        args = (grad_a, grad_b, grad, threshold, rng, t.numel)
        launch(drop_mix_backward_kernel, t.count, grad, *args, block=t.block)
    return grad_a, grad_b
