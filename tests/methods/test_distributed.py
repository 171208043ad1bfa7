"""Two processes reconstruct one model: the same bits on both, from run to run, and what one process would compute."""

import os
import warnings
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from networks import CALIBRATION, HELD_OUT, net
from processes import Ended, Pair
from torch import nn

import hdrq
from hdrq.calibrate import ranges
from hdrq.calibrate.data import calibration_calls
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.calibrate.shared_workdir import SharedWorkdir
from hdrq.checkpoint.workdir import state_hash
from hdrq.errors import RankError
from hdrq.methods.reconstruct.learner import Learner
from hdrq.methods.reconstruct.parameters import Parameters
from hdrq.quantizers.provenance import statistics_of
from hdrq.report import report_of

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def pair():
    pair = Pair()
    yield pair
    pair.close()


def run(group, recipe="brecq", **options):
    """The bits of a model, and its report."""
    options = {"bits": "W3A3", "held_out": HELD_OUT, "progress": False, **options}
    if recipe in ("brecq", "qdrop", "hdrq"):
        options = {"iterations": 12, **({"distance": 0} if recipe == "hdrq" else {}), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hdrq.quantize(net(), options.pop("calibration", CALIBRATION), recipe, process_group=group, **options)
    return state_hash(model.state_dict()), report_of(model)


# --- equal bits


@pytest.mark.parametrize(("recipe", "preset"), [("brecq", "official"), ("qdrop", "paper"), ("hdrq", "paper")])
def test_both_ranks_have_the_same_bits_from_run_to_run(pair, recipe, preset):
    (first, report), (second, _) = pair(run, recipe, preset=preset)
    again, _ = pair(run, recipe, preset=preset)[0]
    assert first == second == again != run(None, recipe, preset=preset)[0]
    assert len(report.blocks) == (8 if preset == "official" else 4)  # BRECQ's has a walk for activations


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_what_learns_nothing_is_what_one_process_makes(pair, recipe):
    alone, ours = run(None, recipe), pair(run, recipe)
    assert alone[0] == ours[0][0] == ours[1][0]
    assert ours[0][1].errors == pytest.approx(alone[1].errors, rel=1e-9)


def test_a_process_that_asks_for_no_group_runs_alone_in_one(pair):
    assert pair(lone)[0][0] == run(None)[0]


def lone(group):
    return run(None) if dist.get_rank(group) == 0 else None


class Mixed(nn.Module):
    """It reads as many rows of a sample as the sample says, so that no two are read alike."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x)[:, : 1 + int(x[0, 0, 0] > 0)]).sum((1, 2))


def read(group, model, limit):
    """What ranges are searched on, by all ranks of a group or by one process."""
    ranks = ALONE if group is None else Ranks.of(group)
    ranges.SAMPLED, before = limit, ranges.SAMPLED
    calls = calibration_calls(torch.randn((11, 6, 4), generator=torch.Generator().manual_seed(0)).split(4))
    try:
        return {name: each.joined for name, each in ranges._read_samples(model, calls, ["a", "b"], 0, ranks).items()}
    finally:
        ranges.SAMPLED = before


@pytest.mark.parametrize("limit", [11 * 7, 2**20])
@pytest.mark.parametrize("model", [Mixed(), nn.Sequential()], ids=["samples that differ", "samples alike"])
def test_ranges_are_searched_on_the_elements_that_one_process_draws(pair, model, limit):
    if not isinstance(model, Mixed):
        model.add_module("a", nn.Linear(4, 4))
        model.add_module("b", nn.Linear(4, 4))
    want = read(None, model, limit)
    for got in pair(read, model, limit):
        assert all(torch.equal(got[name], want[name]) for name in want)


# --- what one process would compute


def first_steps(group, recipe, batch=None, **options):
    """The gradients that the optimizer is given at the first step of each unit, the samples of it, and the loss."""
    found, start, step, learn = [], Learner.__init__, Parameters.step, Learner.step

    def starting(self, unit, *args):
        start(self, unit, *args)
        if batch is not None:
            self.indices[0] = batch[len(found)]
        found.append({"samples": self.indices[0] + self.ranks.span(unit.count)[0], "streams": self.rngs[:, 1].clone()})

    def stepping(self):
        found[-1]["gradients"] = {name: p.grad.clone() for name, p in self.by_name.items()}
        step(self)

    def learning(self, samples):
        found[-1]["loss"], loss = map(float, learn(self, samples))
        return torch.tensor(found[-1]["loss"]), torch.tensor(loss)

    Learner.__init__, Parameters.step, Learner.step = starting, stepping, learning
    try:
        options = {"iterations": 1, "weight_lr": 0.0, "activation_lr": 0.0, "bias_lr": 1e-30, **options}
        return found, run(group, recipe, **options)[1]
    finally:
        Learner.__init__, Parameters.step, Learner.step = start, step, learn


EVERYTHING = {"input_keep": 1.0, "activation_keep": 1.0}


@pytest.mark.parametrize(("recipe", "options"), [("brecq", {}), ("hdrq", {"noise_activations": False})])
def test_the_first_step_has_the_gradient_of_the_whole_batch(pair, recipe, options):
    (ours, report), (theirs, _) = pair(first_steps, recipe, **EVERYTHING, **options)
    batch = [torch.cat([a["samples"], b["samples"]]) for a, b in zip(ours, theirs, strict=True)]
    assert all(len(samples.unique()) == 32 for samples in batch)
    alone, expected = first_steps(None, recipe, batch, **EVERYTHING, **options)
    for a, b, one in zip(ours, theirs, alone, strict=True):
        assert a["loss"] == b["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert a["gradients"].keys() == one["gradients"].keys() and any(".bias" in name for name in a["gradients"])
        for name, gradient in one["gradients"].items():
            assert torch.equal(a["gradients"][name], b["gradients"][name])
            assert (a["gradients"][name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    for got, want in zip(report.blocks, expected.blocks, strict=True):
        assert got.loss_before == pytest.approx(want.loss_before, rel=1e-6)
    assert report.nearest == pytest.approx(expected.nearest, rel=1e-9)


def test_noise_of_weights_is_one_and_what_depends_on_samples_has_streams_of_its_own(pair):
    (ours, _), (theirs, _) = pair(first_steps, "qdrop")
    alone, _ = first_steps(None, "qdrop")
    for a, b, one in zip(ours, theirs, alone, strict=True):
        weights = 1  # a unit of this network has one weight, one activation and one input
        assert torch.equal(a["streams"], one["streams"]) and len(a["streams"]) == 3
        assert torch.equal(a["streams"][:weights], b["streams"][:weights])
        assert not set(a["streams"][weights:].tolist()) & set(b["streams"].tolist())
        assert not set(a["samples"].tolist()) & set(b["samples"].tolist())
        assert not torch.equal(a["samples"], b["samples"] - 48)  # each has an order of its own


def test_samples_are_judged_and_learned_from_as_in_one_process(pair):
    ranks = [replace(ALONE, rank=rank, size=3) for rank in range(3)]
    samples = torch.arange(50)
    assert torch.equal(torch.cat([r.own(samples, 50) + r.span(50)[0] for r in ranks]), samples)
    calls = calibration_calls(torch.randn(50, 2).split(7))
    shared = [call for r in ranks for call in r.share(calls)]
    assert torch.equal(torch.cat([call.args[0] for call in shared]), torch.cat([call.args[0] for call in calls]))
    assert sum(any(call is one for one in calls) for call in shared) == 6  # two of eight are cut


def statistics(group):
    model = hdrq.quantize(net(), CALIBRATION, "rtn", statistics=True, process_group=group)
    return statistics_of(model)


def test_statistics_are_sums_over_all_ranks(pair):
    alone, ours = statistics(None), pair(statistics)
    for name, (facts, tensors) in alone.items():
        for got in ours:
            assert got[name].facts == facts
            assert all(torch.allclose(got[name].tensors[each], tensors[each], rtol=1e-6) for each in tensors)


# --- one rank that fails


class Failing(nn.Module):
    """It raises on a rank, at a call of so many."""

    def __init__(self, rank, calls):
        super().__init__()
        self.rank, self.calls, self.layer = rank, calls, net()

    def forward(self, x):
        self.calls -= 1
        if dist.is_initialized() and dist.get_rank() == self.rank and self.calls < 0:
            raise ArithmeticError("out of luck")
        return self.layer(x)


def fail(group, calls):
    model = Failing(1, calls).eval()
    return hdrq.quantize(model, CALIBRATION, "rtn", process_group=group, held_out=HELD_OUT, progress=False)


@pytest.mark.parametrize("calls", [0, 3, 12])
def test_one_rank_that_raises_ends_both_with_its_message(pair, calls):
    first, second = pair(fail, calls)
    assert isinstance(first, RankError) and "rank 1 has failed" in str(first) and "out of luck" in str(first)
    assert not isinstance(second, RankError) and "out of luck" in str(second)
    assert pair(run, "rtn")[0][0] == run(None, "rtn")[0]  # the group is as good as before


def wait_in_vain(group):
    impatient = dist.new_group(timeout=timedelta(seconds=2))
    return run(impatient, "rtn") if dist.get_rank(group) == 0 else None


def test_a_rank_that_never_comes_ends_the_other_after_the_timeout_of_the_group(pair):
    waited, _ = pair(wait_in_vain)
    assert isinstance(waited, RankError) and "got no answer" in str(waited)


def differ(group, what):
    rank = dist.get_rank(group)
    options = {"model": net(rank) if what == "model" else net()}
    if what == "seed":
        options["seed"] = rank
    if what == "fitted":
        fit = hdrq.methods.reconstruct.method.Reconstruction.fit

        def fitted(self, unit, journal):
            result = fit(self, unit, journal)
            if rank and unit.name == "3":
                unit.layers[0].latent[0] = 0
            return result

        hdrq.methods.reconstruct.method.Reconstruction.fit = fitted
    try:
        hdrq.quantize(
            options.pop("model"), CALIBRATION, "brecq", iterations=2, process_group=group, progress=False, **options
        )
    finally:
        if what == "fitted":
            hdrq.methods.reconstruct.method.Reconstruction.fit = fit


@pytest.mark.parametrize(("what", "named"), [("model", "model"), ("seed", "seed"), ("fitted", "block 3")])
def test_ranks_that_differ_are_refused_by_name(pair, what, named):
    for error in pair(differ, what):
        assert isinstance(
            error, ValueError
        ) and f"ranks must be alike, got different ones on ranks 0 and 1: {named}" in str(error)


def diverge(group):
    """What a run says of a loss that is infinite for the samples of rank 1 alone, at one iteration."""
    loss = Learner._reconstruction_loss

    def broken(self, batch):
        infinite = dist.get_rank(group) == 1 and int(self.rngs[0, 2]) == 7
        return loss(self, batch) * (torch.inf if infinite else 1.0)

    Learner._reconstruction_loss = broken
    try:
        run(group, "hdrq", iterations=60)
    except hdrq.DivergenceError as error:
        return str(error)
    finally:
        Learner._reconstruction_loss = loss


def test_a_loss_that_one_rank_finds_infinite_ends_both_alike(pair):
    ours, theirs = pair(diverge)
    assert ours == theirs and "loss of block 0 must be finite, got inf at iteration 8" in ours


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"recipe": "awq"}, 'recipe must be another than "awq"'),
        ({"graph": True}, "graph must be False"),
        ({"batch_size": 7}, "batch_size must be a multiple of the 2 ranks"),
        ({"calibration": CALIBRATION[:1]}, "calibration must have a sample to learn from for each of 2 ranks"),
        ({"recipe": "hdrq", "noise_activations": True, "noise": "empirical"}, "noise_activations must be False"),
    ],
)
def test_what_ranks_cannot_share_is_refused_at_the_start(pair, options, named):
    for error in pair(run, **options):
        assert isinstance(error, ValueError) and named in str(error)


def test_a_group_is_a_group():
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup or None, got str"):
        run("WORLD")


def broken(group):
    data, model = CALIBRATION.clone(), net()
    data[70] = 3e38
    with torch.no_grad():
        model[0].weight.mul_(100)
    hdrq.quantize(model, data, "brecq", iterations=2, process_group=group, progress=False)


def test_a_sample_that_is_not_finite_is_named_by_its_number_among_all(pair):
    first, second = pair(broken)
    assert "finite values on calibration, got NaN or infinity among samples 48 to 95" in str(second)
    assert isinstance(first, RankError) and str(second) in str(first)


# --- the work folder


def kept(group, folder, stop=None, **options):
    rank = dist.get_rank(group)

    def watch(step):
        if stop is not None and (step.index, step.iteration) == stop:
            os._exit(9)

    return run(
        group, "qdrop", workdir=folder / str(rank), iterations=60, checkpoint_every=20, progress=watch, **options
    )


def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(pair, tmp_path):
    whole = pair(kept, tmp_path / "whole")[0][0]
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["0"]  # rank 0 alone writes
    other = Pair()
    try:
        gone, left = other(kept, tmp_path / "killed", stop=(1, 50))
    finally:
        other.close()
    assert isinstance(gone, Ended) and isinstance(left, RankError) and "every rank must stay" in str(left)
    assert {path.name for path in (tmp_path / "killed/0").iterdir()} >= {"block-000.safetensors", "current.safetensors"}
    assert pair(kept, tmp_path / "killed", resume=True)[0][0] == whole
    with pytest.raises(ValueError, match=r"processes \(2, now None\)"):
        run(None, "qdrop", workdir=tmp_path / "killed/0", iterations=60, resume=True)


def test_rank_1_touches_nothing_of_the_work_folder(tmp_path):
    folder = SharedWorkdir.__new__(SharedWorkdir)
    folder.path, folder.ranks = tmp_path, Ranks(None, 1, 2)
    (tmp_path / "current.safetensors").write_text("of rank 0")
    folder.save_current({"a": torch.zeros(1)}, {"index": 0})
    folder.save_block(0, {"a": torch.zeros(1)}, {})
    folder.write_losses([("a", 1, 0.5)])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of rank 0"]


def test_what_rank_0_cannot_write_ends_both(pair, tmp_path):
    (tmp_path / "0").write_text("no folder")
    for error in pair(kept, tmp_path):
        assert "workdir must be a folder" in str(error)
