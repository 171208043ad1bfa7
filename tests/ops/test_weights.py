import pytest
import torch
from helpers import FLOATS, assert_same_bits, backend_params, device_of, sample, scales

import hdrq

RANGES = [(-8, 7), (-128, 127), (-2, 1)]
SHAPES = [(6, 3, 3, 3), (4, 300), (3, 130)]  # rows shorter and longer than a tile, tensors longer than one, and tails
MODES = ("round", "uniform", "empirical")


def inputs(device, dtype, axis, sources):
    weights = [sample(shape, dtype, seed=k, special=False).to(device) for k, shape in enumerate(SHAPES)]
    steps = [scales(1 if axis is None else w.shape[axis], seed=k).to(device) for k, w in enumerate(weights)]
    theirs = [w + 0.1 * sample(w.shape, dtype, seed=9, special=False).to(device) for w in weights]
    rngs = [hdrq.rng_state(5, stream, 2, device=device) for stream in range(len(weights))]
    return weights, steps, theirs if sources else None, rngs


def apart(w, s, quant_range, source, rng, mode, axis):
    """The same by the ops of one tensor."""
    factor = 1 / (w.numel() * quant_range[1]) ** 0.5
    if mode == "round":
        y = hdrq.ops.fake_quantize(w, s, *quant_range, axis=axis, grad_scale=factor)
    else:
        y = hdrq.ops.noise_quantize(w, s, *quant_range, rng, noise=mode, axis=axis, grad_scale=factor)
    return y, None if source is None else hdrq.ops.source_distance(w, source)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sources", [True, False])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", backend_params())
def test_together_they_are_what_they_are_apart(backend, mode, axis, sources, dtype):
    weights, steps, theirs, rngs = inputs(device_of(backend), dtype, axis, sources)
    pulls = [0.5, -2.0, 3.0]
    grads = [sample(w.shape, dtype, seed=7, special=False).to(w.device) for w in weights]
    ours, expected = ([[t.clone().requires_grad_() for t in ts] for ts in (weights, steps)] for _ in range(2))
    with hdrq.use_backend(backend):
        ys, distances = hdrq.ops.quantize_weights(
            *ours,
            RANGES,
            sources=theirs,
            rngs=None if mode == "round" else rngs,
            noise="empirical" if mode == "empirical" else "uniform",
            axis=axis,
        )
        loss = sum((y * g).sum() for y, g in zip(ys, grads, strict=True))
        (loss if distances is None else loss + sum(p * d for p, d in zip(pulls, distances, strict=True))).backward()
        for k, (w, s) in enumerate(zip(*expected, strict=True)):
            y, distance = apart(w, s, RANGES[k], theirs and theirs[k], rngs[k], mode, axis)
            assert_same_bits(ys[k], y)
            loss = (y * grads[k]).sum()
            if distance is not None:
                torch.testing.assert_close(distances[k], distance, rtol=1e-6, atol=0)
                loss = loss + pulls[k] * distance
            loss.backward()
            # Apart, each of two gradients is rounded before they are added.
            rounding = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours[0][k].grad, w.grad, rtol=rounding, atol=rounding)
            torch.testing.assert_close(ours[1][k].grad, s.grad)


def test_a_weight_at_its_source_is_not_pulled():
    w = torch.ones(5, requires_grad=True)
    ys, distances = hdrq.ops.quantize_weights([w], [torch.ones(1)], [(-8, 7)], sources=[torch.ones(5)])
    (ys[0].sum() * 0 + distances.sum()).backward()
    assert distances.tolist() == [0.0]
    assert w.grad.tolist() == [0.0] * 5


def test_an_unused_result_has_no_part_in_the_gradient():
    weights = [torch.randn(4, requires_grad=True) for _ in range(2)]
    ys, _ = hdrq.ops.quantize_weights(weights, [torch.ones(1)] * 2, [(-8, 7)] * 2)
    ys[1].sum().backward()
    assert weights[0].grad is None or not weights[0].grad.any()
    assert weights[1].grad.tolist() == [1.0] * 4


W, S, R = torch.ones(4, 2), torch.ones(1), hdrq.rng_state(0)
BAD = [
    (ValueError, "weights must be one or more tensors, got none", {"weights": []}),
    (ValueError, "scales must be as many as weights, 2, got 1", {"scales": [S]}),
    (ValueError, "ranges must be as many as weights, 2, got 1", {"ranges": [(-8, 7)], "grad_scales": [1.0, 1.0]}),
    (ValueError, "rngs must be as many as weights, 2, got 1", {"rngs": [R]}),
    (ValueError, r"sources\[1\] must have the shape of weights\[1\], \(4, 2\), got \(2, 4\)", {"sources": [W, W.T]}),
    (TypeError, r"weights\[1\] must be a tensor of float32, got float16", {"weights": [W, W.half()]}),
    (ValueError, r"scales\[1\] must be positive and finite, got 0.0", {"scales": [S, S * 0]}),
    (ValueError, "noise must be one of 'uniform', 'empirical', got 'pink'", {"noise": "pink"}),
    (ValueError, "qmin must be less than qmax", {"ranges": [(-8, 7), (3, 3)]}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(error, message, change):
    arguments = {"weights": [W, W], "scales": [S, S], "ranges": [(-8, 7)] * 2} | change
    with pytest.raises(error, match=message):
        hdrq.ops.quantize_weights(**arguments)
