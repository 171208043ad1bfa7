"""The loss between models with the noise of quantization, around one, and distances."""

import math

import pytest
import torch
from torch import nn

import hdrq
from hdrq.evaluate import direction_surface, distances, error_barrier, noisy_error_barrier
from hdrq.merging.files import readiness


def quantized(seed, bits="W4A8", **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 40)).eval()
    return hdrq.quantize(model, torch.randn(50, 2, 4, 4), "rtn", bits={"*": bits}, **options)


def weights(model):
    return [model[k].weight.detach().double() for k in (0, 3)]


def square(model):
    return float(sum(w.square().sum() for w in weights(model)))


# --- Eq. 3


def test_noise_has_the_steps_of_each_end_and_of_the_merge_between():
    """Of ``L = ‖w‖²`` noise adds ``n·s²/12``, with the step of the merge: 200 draws tell it to a few per cent."""
    first, second = quantized(0), quantized(1)
    with torch.no_grad():
        second[3].parametrizations.weight[0].scale.mul_(3)
        second[3].parametrizations.weight.original.mul_(3)
    found = noisy_error_barrier(first, second, square, points=3, draws=200)
    assert found.losses.shape == (200, 3) and found.positions.tolist() == [0, 0.5, 1]
    for column, share in enumerate((0, 0.5, 1)):
        ends = [[(1 - share) * a, share * b] for a, b in zip(weights(first), weights(second), strict=True)]
        want = 0.0
        for k, (a, b) in zip((0, 3), ends, strict=True):
            one, two = (float(m[k].parametrizations.weight[0].scale) for m in (first, second))
            step = (1 - share) * one + share * two
            want += float((a + b).square().sum()) + a.numel() * step**2 / 12
        # A mean of draws: w·ε adds no bias, and its spread is what the draws' own is.
        spread = float(found.losses[:, column].std()) / 200**0.5
        assert abs(float(found.losses[:, column].mean()) - want) < 4 * spread


def test_noise_is_neither_rounded_nor_clamped_and_stays_within_half_a_step():
    model, seen = quantized(0, "W2A8"), []
    before = weights(model)
    steps = [model[k].parametrizations.weight[0].scale for k in (0, 3)]

    def note(moved):
        seen.append([(w - b) / s for w, b, s in zip(weights(moved), before, steps, strict=True)])
        return 0.0

    noisy_error_barrier(model, model, note, points=2, draws=3)
    for each in seen:
        for n in each:
            assert float(n.abs().max()) <= 0.5 + 1e-6 and float(n.std()) == pytest.approx(12**-0.5, rel=0.2)
            assert (n != 0).float().mean() > 0.99  # at the ends of the range too
    for first, second in ((0, 3), (1, 4), (2, 5)):  # one noise at every λ of a draw: here the ends are one model
        assert torch.equal(seen[first][1], seen[second][1])
    one, two = (each.flatten()[:40] for each in seen[0])  # layers draw apart
    assert (one - two).abs().max() > 0.1
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0][0, 0], seen[0][0][1, 0])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_the_barrier_is_the_mean_of_those_of_the_draws():
    first, second = quantized(0), quantized(1)
    hill = lambda m: -square(m)  # noqa: E731
    found = noisy_error_barrier(first, second, hill, points=5, draws=4, seed=3)
    each = found.losses.amax(1) - (found.losses[:, 0] + found.losses[:, -1]) / 2
    assert found.value == pytest.approx(float(each.mean())) and found.standard_error == pytest.approx(
        float(each.std()) / 2
    )
    again, other = (noisy_error_barrier(first, second, hill, points=5, draws=4, seed=seed) for seed in (3, 4))
    assert torch.equal(again.losses, found.losses) and not torch.equal(other.losses, found.losses)
    assert math.isnan(noisy_error_barrier(first, second, hill, points=2, draws=1).standard_error)


def test_models_in_full_precision_take_the_steps_of_others():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 3)).eval() for _ in range(2)]
    steps = [hdrq.quantize(m, torch.randn(20, 4), "rtn", bits={"*": "W3A8"}) for m in models]
    loss = lambda m: -float(m[0].weight.detach().double().square().sum())  # noqa: E731
    plain, noisy = error_barrier(*models, loss), noisy_error_barrier(*models, loss, steps=steps)
    assert plain.losses[0] != noisy.losses[0, 0] and noisy.value == pytest.approx(plain.value, rel=0.5)
    with pytest.raises(ValueError, match="steps must be two quantized models where those measured are not, got one in"):
        noisy_error_barrier(*models, loss)
    with pytest.raises(ValueError, match="steps must be two models, got 1"):
        noisy_error_barrier(*models, loss, steps=steps[:1])
    with pytest.raises(ValueError, match="quantized layers of those measured, got others in 0; 3"):
        noisy_error_barrier(*models, loss, steps=[quantized(0), quantized(1)])


# --- random directions


def test_filters_move_by_their_own_norms():
    """A step of x moves each filter by x times its norm, so that ``‖w_f(x) − w_f‖ = x·‖w_f‖``; one of zeros stays."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 4, 2), nn.Linear(5, 4), nn.BatchNorm1d(4)
    model = nn.ModuleList(layers).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
    start, seen = [p.detach().clone() for p in model.parameters()], []

    def note(moved):
        seen.append([p.detach().clone() for p in moved.parameters()])
        return len(seen)

    surface = direction_surface(model, note, points=3, reach=0.5)
    assert surface.x.tolist() == surface.y.tolist() == [-0.5, 0, 0.5]
    assert surface.losses.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert all(torch.equal(a, b) for a, b in zip(start, seen[4], strict=True))
    names = [name for name, _ in model.named_parameters()]
    for name, a, b, c in zip(names, start, seen[5], seen[7], strict=True):
        if name.endswith("bias") or name.startswith("3"):
            assert torch.equal(a, b)
            continue
        axis = 1 if name.startswith("1") else 0
        norms, right, up = ((v.transpose(0, axis).flatten(1).norm(dim=1)) for v in (a, b - a, c - a))
        torch.testing.assert_close(right, 0.5 * norms)
        torch.testing.assert_close(up, 0.5 * norms)
        assert torch.nn.functional.cosine_similarity((b - a).flatten(), (c - a).flatten(), 0).abs() < 0.6
    line = direction_surface(model, lambda m: float(m[2].weight.detach().sum()), directions=1, points=3, reach=0.5)
    assert line.losses.shape == (1, 3) and line.y.tolist() == [0]
    assert line.losses[0, 2] == pytest.approx(float(seen[5][4].sum()))


def test_latents_of_a_quantized_model_move_and_are_rounded_with_scales_held():
    model, seen = quantized(0), []

    def note(moved):
        for k in (0, 3):
            own, kept = moved[k].parametrizations.weight, model[k].parametrizations.weight
            assert torch.equal(own[0].scale, kept[0].scale)
            codes = moved[k].weight / own[0].scale
            assert (codes - codes.round()).abs().max() < 1e-4
        seen.append(square(moved))
        return seen[-1]

    direction_surface(model, note, directions=1, points=3, reach=0.5)
    assert seen[1] == square(model) and len(set(seen)) == 3


def test_scales_move_alone():
    model, seen = quantized(0), []

    def note(moved):
        pairs = [(moved[k].parametrizations.weight, model[k].parametrizations.weight) for k in (0, 3)]
        assert all(torch.equal(a.original, b.original) for a, b in pairs)
        readers = [(moved[k].input_quantizer, model[k].input_quantizer) for k in (0, 3)]
        seen.append([float(a.scale / b.scale) for a, b in [(a[0], b[0]) for a, b in pairs] + readers])
        return 0.0

    direction_surface(model, note, move="scales", directions=1, points=3, reach=0.5)
    assert seen[1] == [1] * 4 and len(set(seen[2])) == 4 and min(seen[0] + seen[2]) > 0
    assert [a * b for a, b in zip(seen[0], seen[2], strict=True)] == pytest.approx([1] * 4, rel=1e-5)
    with pytest.raises(ValueError, match='model must be quantized for move="scales", got one in full precision'):
        direction_surface(nn.Linear(2, 2), note, move="scales")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"move": "biases"}, "move must be one of 'weights', 'scales', got 'biases'"),
        ({"directions": 3}, r"directions must be in \[1, 2\], got 3"),
        ({"points": 1}, "points must be in"),
        ({"reach": -1.0}, "reach must be finite and in"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_directions_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        direction_surface(nn.Linear(2, 2), lambda m: 0.0, **options)


# --- distances


def test_distances_are_those_of_readiness_and_sum_up():
    models = [quantized(k, "W4A8", per_channel=True) for k in range(3)]
    found = distances(models)
    assert [(d.first, d.second, d.layer) for d in found[:3]] == [(0, 1, "0"), (0, 1, "3"), (0, 1, "all layers")]
    assert len(found) == 9
    for i, j in ((0, 1), (0, 2), (1, 2)):
        own = {d.layer: d for d in found if (d.first, d.second) == (i, j)}
        for layer in readiness([models[i], models[j]]).layers:
            assert own[layer.name].relative == pytest.approx(layer.distance, rel=1e-6)
        pairs = [*zip(weights(models[i]), weights(models[j]), strict=True)]
        apart = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
        norms = [sum(float(w.square().sum()) for w in each) ** 0.5 for each in zip(*pairs, strict=True)]
        assert own["all layers"].distance == pytest.approx(apart)
        assert own["all layers"].relative == pytest.approx(2 * apart / sum(norms))


def test_distances_of_integers():
    first, second = (nn.Sequential(nn.Linear(4, 1)).eval() for _ in range(2))
    with torch.no_grad():
        first[0].weight[:] = torch.tensor([7.0, 1, 2, -3])
        second[0].weight[:] = torch.tensor([14.0, 2, 6, -6])  # steps twice as large
    models = [hdrq.quantize(m, torch.randn(9, 4), "rtn", bits={"*": "W4A8"}) for m in (first, second)]
    for model, step in zip(models, (1.0, 2.0), strict=True):
        model[0].parametrizations.weight[0].scale.data.fill_(step)
    whole = distances(models)[-1]
    assert whole.changed == 0.25 and whole.integers == pytest.approx(0.5)  # integers 7, 1, 3, −3 against 7, 1, 2, −3
    assert whole.distance == pytest.approx((49 + 1 + 16 + 9) ** 0.5)
    mixed = distances([first, models[0]])[-1]
    assert (mixed.integers, mixed.changed, mixed.distance) == (None, None, 0)


def test_distances_need_the_same_layers():
    with pytest.raises(ValueError, match="models must be two or more, got 1"):
        distances([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="models must have the same layers, got number 1 different in 0"):
        distances([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 3))])
