"""What changes no bit of a run: the caller's random state and modes, the form of the data, recomputation."""

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, Checkpointed, learn, net
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_seed_decides_every_bit():
    first, second, other = (state(learn(seed=seed, iterations=12)) for seed in (3, 3, 4))
    assert same(first, second) and not same(first, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
def test_cuda_graph_moves_no_bit(recipe):
    states = [
        state(learn(net().cuda(), CALIBRATION.cuda(), recipe=recipe, iterations=30, graph=g)) for g in (True, False)
    ]
    assert same(*states)


def test_global_random_state_does_not_matter():
    torch.manual_seed(1)
    first = state(learn())
    torch.manual_seed(2)
    assert same(first, state(learn()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_of_the_caller_does_not_matter(mode):
    model, want = net(), state(learn())
    with mode():
        assert same(want, state(learn(model)))


class Named(nn.Module):
    """A model that is called with one or two arguments, by place or by name."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, image, bias=0.0):
        return self.body(image) + bias


def test_calibration_in_every_form_gives_the_same_bits():
    first, second = CALIBRATION.split(48)
    forms = [
        CALIBRATION,
        [first, second],
        [(first,), (second,)],
        [[first], [second]],
        [{"image": first}, {"image": second}],
        [{"image": first, "bias": 1.0}, {"image": second, "bias": 1.0}],
        iter([first, second]),
        [first, CALIBRATION[:0], second],
    ]
    states = [state(learn(Named().eval(), form)) for form in forms]
    assert all(same(states[0], other) for other in states[1:])


def test_model_of_two_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)

        def forward(self, x, y):
            return self.b(self.a(x) * y)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Two().eval(), torch.randn(20, 4), torch.randn(20, 5)
    first = learn(model, [(x, y)])
    assert same(state(first), state(learn(model, [{"x": x, "y": y}])))


def recomputed(run, x):
    return checkpoint(run, x, use_reentrant=False)


@pytest.mark.parametrize("recipe", ["hdrq", "brecq"])
def test_a_block_that_recomputes_is_learned_alike(recipe):
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    options = {"calibration": data, "recipe": recipe, "iterations": 20}
    results = [
        state(learn(nn.Sequential(Checkpointed(wrap), Checkpointed(wrap)).eval(), **options))
        for wrap in (recomputed, lambda run, x: run(x))
    ]
    assert same(*results)
