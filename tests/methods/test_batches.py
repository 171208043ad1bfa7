"""The order in which samples are learned from, and the streams of noise."""

import torch
from networks import learn

from hdrq.methods.reconstruct.learner import Learner
from hdrq.methods.reconstruct.samples import order as order_of
from hdrq.rng import rng_state


def test_each_pass_reads_every_sample_once():
    order = order_of(10, 35, rng_state(0))
    assert len(order) == 35 and len(order_of(10, 0, rng_state(0))) == 0
    passes = order[:30].view(3, 10)
    assert all(torch.equal(each.sort().values, torch.arange(10)) for each in passes)
    assert len(order[30:].unique()) == 5 and not torch.equal(passes[0], passes[1])


def learners(monkeypatch, seed):
    made = []

    class Watched(Learner):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("hdrq.methods.reconstruct.method.Learner", Watched)
    learn(seed=seed, iterations=4, batch_size=8)
    return made


def test_no_unit_of_another_seed_has_the_same_batches(monkeypatch, every_step_kept):
    indices = [each.indices for seed in (0, 1, 2) for each in learners(monkeypatch, seed)]
    assert len(indices) == 12 and all(i.shape == (4, 8) for i in indices)
    same = [(i, k) for i in range(12) for k in range(i) if torch.equal(indices[i], indices[k])]
    assert not same


def test_every_quantizer_and_every_input_has_a_stream_of_its_own(monkeypatch, every_step_kept):
    streams = [
        (int(rng[0]), int(rng[1])) for seed in (0, 1) for each in learners(monkeypatch, seed) for rng in each.rngs
    ]
    assert len(streams) == len(set(streams)) == 2 * 4 * 3  # a weight, what it reads, and the mix of that
