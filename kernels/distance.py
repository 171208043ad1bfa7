"""Distance to the source, in Triton. Definition: :mod:`hdrq.backends.reference.distance`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import launch, operand, tiling


@triton.jit
def source_distance_kernel(squares, w, w_src, numel, BLOCK: tl.constexpr):
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    d = lang.difference(w, w_src, start, i, i < numel - start)
    tl.store(squares + tl.program_id(0), tl.sum(d * d))


@triton.jit
def source_distance_backward_kernel(grad_w, grad, distance, w, w_src, numel, BLOCK: tl.constexpr):
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    d = lang.difference(w, w_src, start, i, live)
    tl.store(grad_w + start + i, (d * lang.pull(grad, distance)).to(grad_w.dtype.element_ty), mask=live)


def source_distance(w, w_src) -> torch.Tensor:
    w, w_src = operand(w), operand(w_src)
    if w.numel() == 0:
        return w.new_zeros((), dtype=torch.float32)
    t = tiling(w, None)
    squares = torch.empty(t.count, dtype=torch.float32, device=w.device)
    launch(source_distance_kernel, t.count, w, squares, w, w_src, t.numel, block=t.block)
    return squares.sum(dtype=torch.float64).sqrt().float()


def source_distance_backward(grad, distance, w, w_src) -> torch.Tensor:
    w, w_src = operand(w), operand(w_src)
    grad_w = torch.empty_like(w)
    if w.numel() > 0:
        t = tiling(w, None)
        args = (grad_w, grad, distance, w, w_src, t.numel)
        launch(source_distance_backward_kernel, t.count, w, *args, block=t.block)
    return grad_w
