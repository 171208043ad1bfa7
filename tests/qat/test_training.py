"""Training with one domain left out: what it learns from, that it repeats to the bit, what it selects."""

import csv
import io

import pytest
import torch
from helpers import assert_same_bits, same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hdrq
from hdrq import qat
from hdrq.qat.domains import Labelled, Stream, split
from hdrq.qat.training import OPTIMIZERS

BASE = {"bits": "W4A4", "epochs": 3, "batch_size": 8, "lr": 0.05, "progress": False}


def domain(seed, count=40):
    """Three classes of 3 × 6 × 6, a pattern each, in the colour and the noise of a domain."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(100))
    labels = torch.randint(3, (count,), generator=generator)
    colour = torch.rand(1, 3, 1, 1, generator=generator) + 0.5
    return patterns[labels] * colour + 1.5 * torch.randn(count, 3, 6, 6, generator=generator), labels


DOMAINS = {"a": domain(1), "b": domain(2, 25), "c": domain(3)}


class Noisy(nn.Sequential):
    """A small network with dropout and BatchNorm."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        made = Noisy(*layers, nn.Flatten(), nn.Linear(32, 3))
        made(DOMAINS["a"][0])
    return made.eval()


def train(target="c", domains=DOMAINS, **options):
    return qat.train(model(), domains, target, **{**BASE, **options})


def test_a_model_learns_and_is_a_checkpoint_like_any_other(tmp_path):
    start = model()
    before = state(start)
    found = qat.leave_one_out(start, DOMAINS, targets=["b", "c"], **{**BASE, "epochs": 8})
    assert same(before, state(start))
    assert all(one.in_domain > 60 and one.out_of_domain > 60 for one in found.values()), found
    for name, one in found.items():
        hdrq.save(one.model, tmp_path / f"{name}.safetensors")
        assert_same_bits(
            hdrq.load(tmp_path / f"{name}.safetensors", model())(DOMAINS["a"][0]), one.model(DOMAINS["a"][0])
        )
        assert f"left out: {name}" in one.caption and "nothing was learned from" in one.caption
    assert not same(state(hdrq.merge([one.model for one in found.values()])), before)


def test_training_in_float_has_no_quantizers():
    found = train(bits="float", flatness="sam")
    assert qat.quantizers(found.model) == {} and found.model.state_dict().keys() == model().state_dict().keys()
    assert not same(state(found.model), state(model()))


@pytest.mark.parametrize("options", [{"flatness": "sam", "rho": 0.0}, {"flatness": "sagm", "rho": 0.0, "alpha": 0.0}])
def test_no_movement_is_plain_lsq_to_the_bit(options):
    assert same(state(train().model), state(train(**options).model))


def test_never_freezing_is_sagm_to_the_bit():
    sagm = train(flatness="sagm")
    never = train(flatness="sagm", freeze="gaqat_a", rule={"period": 3, "tau": 0.0})
    always = train(flatness="sagm", freeze="gaqat_a", rule={"period": 3, "tau": 1.0})
    assert same(state(sagm.model), state(never.model)) and len(never.history) == 4
    assert not same(state(sagm.model), state(always.model))
    assert always.rows[-1]["frozen"] and not never.rows[-1]["frozen"]


def test_a_seed_decides_every_bit():
    torch.manual_seed(1)
    first = train(flatness="sam")
    torch.manual_seed(2)
    assert same(state(first.model), state(train(flatness="sam").model))
    assert not same(state(first.model), state(train(flatness="sam", seed=1).model))


@pytest.mark.parametrize(
    "options",
    [
        {"flatness": "sagm", "freeze": "fqat", "rule": {"period": 4, "every": 3, "tau": 0.4}, "batchnorm": "keep"},
        {"optimizer": "adam", "lr": 1e-3, "select": "oracle", "per_channel": True},
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, options):
    def augment(x):
        return x + 0.1 * torch.randn_like(x)

    def stop(step):
        if step.index == 1:
            raise KeyboardInterrupt

    options = {**options, "augment": augment, "epochs": 4}
    whole = train(**options, workdir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(**{**options, "progress": stop}, workdir=tmp_path / "parts")
    with pytest.raises(FileExistsError, match="workdir must hold no run"):
        train(**options, workdir=tmp_path / "parts")
    parts = train(**options, workdir=tmp_path / "parts", resume=True)
    assert same(state(whole.model), state(parts.model))
    assert whole.rows == parts.rows and whole.history == parts.history and whole.epoch == parts.epoch
    texts = [(tmp_path / name / "epochs.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1] and len(list(csv.DictReader(io.StringIO(texts[0])))) == 4
    again = train(**options, workdir=tmp_path / "parts", resume=True)  # it is finished
    assert same(state(whole.model), state(again.model))
    with pytest.raises(ValueError, match=r"resume must have what the run .* settings.seed \(0, now 1\)"):
        train(**options, workdir=tmp_path / "parts", resume=True, seed=1)


def test_nothing_is_learned_from_the_target_nor_from_validation():
    plain = train(select="last")
    other = {**DOMAINS, "c": (DOMAINS["c"][0] * -3, (DOMAINS["c"][1] + 1) % 3)}
    x, y = DOMAINS["a"][0].clone(), DOMAINS["a"][1].clone()
    few = split(Labelled(DOMAINS["a"], "a"), 0.2, 0)[1].index
    assert len(few) == 8
    x[few], y[few] = -x[few], (y[few] + 1) % 3
    other["a"] = x, y
    found = train(select="last", domains=other)
    assert same(state(plain.model), state(found.model))
    assert plain.rows[-1]["validation/a"] != found.rows[-1]["validation/a"]


@pytest.mark.parametrize("rule", ["source", "last", "oracle"])
def test_the_model_is_that_of_the_epoch_that_was_selected(rule):
    found = train(select=rule, epochs=5, seed=2)
    most, few = split(Labelled(DOMAINS["c"], "c"), 0.2, 2)
    for part, column in ((most, "target"), (few, "target_validation")):
        x, y = part.data.batch(part.index)
        accuracy = 100 * (found.model(x).argmax(1) == y).double().mean()
        assert float(accuracy) == pytest.approx(found.rows[found.epoch - 1][column])
    assert found.epoch == qat.selected(found.rows, rule)


def test_rules_of_selection():
    rows = [
        {"validation": v, "target_validation": t} for v, t in ((50, 10), (70, 20), (70, 40), (60, 40))
    ]  # fmt: skip
    assert [qat.selected(rows, rule) for rule in ("source", "last", "oracle")] == [2, 4, 3]


def test_a_pass_reads_every_sample_once_in_an_order_of_its_own():
    part = split(Labelled((torch.arange(12.0), torch.zeros(12, dtype=torch.long)), "d"), 0.1, 0)[0]
    stream = Stream(part, 4, seed=5)
    read = torch.cat([stream.batch(step)[0] for step in range(11)])  # 44 of 4 passes over 11
    passes = read.view(4, 11)
    assert all(sorted(one.tolist()) == part.index.tolist() for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) == 4
    assert_same_bits(Stream(part, 4, seed=5).batch(7)[0], stream.batch(7)[0])


def test_data_may_be_a_dataset_and_a_batch_run_in_parts():
    whole = train(epochs=1, batchnorm="keep", bits="float")
    datasets = {name: TensorDataset(*pair) for name, pair in DOMAINS.items()}
    assert same(state(whole.model), state(train(epochs=1, bits="float", domains=datasets).model))
    fewer = train(epochs=1, parts=4, autocast="bfloat16")
    assert fewer.rows[0]["steps"] == 4


def test_float16_steps_through_a_scaler(tmp_path):
    found = train(autocast="float16", flatness="sagm", epochs=1)
    assert not same(state(found.model), state(train(flatness="sagm", epochs=1).model))
    assert found.rows[0]["loss"] < 2


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"domains": {"c": domain(1)}}, ValueError, "domains must be two or more, .* got 1: c"),
        ({"domains": [domain(1)]}, TypeError, "domains must be a mapping from names to labelled data, got list"),
        (
            {"domains": {**DOMAINS, "b": domain(1)[0]}},
            TypeError,
            r"domains\['b'\] must be samples with labels, got Tensor",
        ),
        ({"domains": {**DOMAINS, "b": DataLoader(TensorDataset(*domain(1)))}}, TypeError, "got a DataLoader; give its"),
        ({"domains": {**DOMAINS, "b": list(domain(1)[0])}}, TypeError, r"domains\['b'\] must be samples with labels"),
        (
            {"domains": {**DOMAINS, "b": (domain(1)[0], torch.zeros(3))}},
            ValueError,
            r"labels of domains\['b'\] must be one",
        ),
        ({"domains": {**DOMAINS, "b": (domain(1)[0], torch.zeros(40))}}, TypeError, "must be integers, .* got float32"),
        (
            {"domains": {**DOMAINS, "b": TensorDataset(domain(1)[0])}},
            TypeError,
            "must have samples with labels, got items",
        ),
        ({"target": "d"}, ValueError, "target must be one of 'a', 'b', 'c', got 'd'"),
        ({"flatness": "sharp"}, ValueError, "flatness must be one of None, 'sam', 'asam', 'sagm', got 'sharp'"),
        ({"freeze": "fqat"}, ValueError, "flatness must be .* with freeze='fqat', got None"),
        ({"freeze": "fqat", "flatness": "sam", "rule": {"period": 1}}, ValueError, r"period must be in \[2, "),
        ({"freeze": "fqat", "flatness": "sam", "rule": {"tau": -1}}, ValueError, r"tau must be .* got -1"),
        ({"rule": {"tau": 0.1}}, ValueError, "rule must be left out without freeze"),
        ({"bits": "float", "perturb": "quantized"}, ValueError, 'bits must be those of quantizers .* got "float"'),
        ({"tau": 0.1}, ValueError, "knob must be one of .* got 'tau'"),
        ({"resume": True}, ValueError, "workdir must be the folder of the run to resume, got None"),
        (
            {"lr": 1e30, "scale_lr": 0.0},
            FloatingPointError,
            "loss must be finite, got .* in step . of epoch 1; a lower lr",
        ),
        (
            {"scale_lr": 3e38},
            FloatingPointError,
            "scales must be finite and above a thousandth of where they began, got",
        ),
    ],
)
def test_refusals(options, kind, message):
    with pytest.raises(kind, match=message):
        train(**options)


def test_a_scale_that_sinks_ends_the_run(monkeypatch):
    monkeypatch.setattr("hdrq.qat.training.collapsed", lambda model: ["3.weight"])
    with pytest.raises(FloatingPointError, match=r"got others in 3\.weight in epoch 1; a lower lr or scale_lr"):
        train()


def test_a_scale_that_is_no_number_ends_the_run_and_is_named(monkeypatch):
    class Broken(torch.optim.SGD):
        def step(self):
            self.param_groups[1]["params"][0].data.fill_(torch.nan)

    monkeypatch.setitem(OPTIMIZERS, "sgd", Broken)
    with pytest.raises(
        FloatingPointError, match=r"scales must be finite .* got others in 0\.weight in epoch 1; a lower"
    ):
        train()


def test_models_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="model must have parameters that require gradients to be trained, got none"):
        qat.train(model().requires_grad_(False), DOMAINS, "c", **{**BASE, "bits": "float"})

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            return {"logits": self.inner(x)}

    with pytest.raises(TypeError, match="model must return its logits, a tensor, got dict; give loss="):
        qat.train(Named().eval(), DOMAINS, "c", **BASE)
    found = qat.train(
        Named().eval(), DOMAINS, "c", **BASE, loss=lambda out, y: nn.functional.cross_entropy(out["logits"], y)
    )
    assert found.rows[-1]["loss"] < found.rows[0]["loss"]
