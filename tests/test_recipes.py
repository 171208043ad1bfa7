"""Recipes: their tables, the knobs that change them, and old names, which work for one release and warn."""

import json
from dataclasses import fields, replace

import pytest
from helpers import same, state
from networks import learn

from hdrq.recipes import Recipe, recipe


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("tail", "fake_quant_fraction", 0.3), ("placement", "activation_placement", "input")],
)
def test_a_knob_of_the_first_house_works_and_warns(old, new, value):
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        assert getattr(recipe("hdrq", **{old: value}), new) == value
    with pytest.raises(ValueError, match=f"{new} must be given once, got {old} too, which is its old name"):
        recipe("hdrq", **{old: value, new: value})


def test_short_runs_have_larger_rates():
    """The product of rate and iterations is kept, down to 400; what is given, and the official presets, stay."""
    rates = {n: recipe("qdrop", iterations=n).weight_lr for n in (10, 400, 2000, 20_000, 40_000)}
    assert rates == pytest.approx({10: 0.05, 400: 0.05, 2000: 0.01, 20_000: 1e-3, 40_000: 1e-3})
    assert recipe("hdrq", "official", iterations=400).weight_lr == 1e-4
    assert recipe("hdrq", iterations=400, weight_lr=2e-3).weight_lr == 2e-3
    assert recipe(Recipe("own"), iterations=400).weight_lr == 1e-3 and recipe("rtn").weight_lr == 1e-3


def test_presets_are_the_tables():
    paper, official = recipe("hdrq"), recipe("hdrq", "official")
    assert (paper.noise, paper.noise_activations, paper.weight_lr) == ("uniform", False, 1e-3)
    assert (official.noise, official.noise_activations, official.weight_lr) == ("empirical", True, 1e-4)
    for plan, tail in ((paper, 3500), (official, 4000)):
        assert (
            plan.iterations == 20_000
            and round(plan.fake_quant_fraction * plan.iterations) == tail
            and plan.distance == 5e-2
        )
    assert recipe("rtn").iterations == 0


def test_baselines_are_the_table():
    brecq, qdrop = recipe("brecq"), recipe("qdrop")
    assert brecq.learns == qdrop.learns == "rounding"
    assert (brecq.input_keep, brecq.activation_keep, qdrop.input_keep, qdrop.activation_keep) == (1, 1, 0.5, 0.5)
    assert {(r.fake_quant_fraction, r.distance, r.activation_lr) for r in (brecq, qdrop)} == {(1, 0, 4e-5)}


def test_official_presets_are_the_released_codes():
    hdrq_, qdrop, brecq = (recipe(name, "official") for name in ("hdrq", "qdrop", "brecq"))
    assert (hdrq_.batch_size, hdrq_.range_samples, hdrq_.judged_samples) == (1, 8, 0)
    assert all(r.affine_weights and r.per_channel and r.batch_size == 32 for r in (qdrop, brecq))
    assert (qdrop.range_samples, qdrop.input_keep, qdrop.activation_walk) == (256, 0.5, 0)
    assert (brecq.activation_walk, brecq.activation_lr, brecq.input_keep) == (0.25, 4e-4, 1)
    assert recipe("rtn", "official") == recipe("rtn")


def test_hdrq_without_noise_and_distance_is_qdrops_loop():
    hdrq_, qdrop = recipe("hdrq", fake_quant_fraction=1, distance=0), recipe("qdrop", learns="weights")
    same_rates = {"weight_schedule": "cosine", "warmup": hdrq_.warmup}
    assert replace(hdrq_, name="qdrop") == replace(qdrop, **same_rates)
    states = [state(learn(recipe=r, iterations=6)) for r in (hdrq_, replace(qdrop, **same_rates))]
    assert same(*states)


def test_recipe_given_is_taken_with_knobs():
    plan = recipe(Recipe("own", iterations=7), fake_quant_fraction=1.0)
    assert (plan.name, plan.iterations, plan.fake_quant_fraction) == ("own", 7, 1.0)
    model = learn(recipe=Recipe("own", distance=0.0))
    assert model.hdrq_origin["recipe"]["name"] == "own" and model.hdrq_origin["recipe"]["iterations"] == 6


def test_every_knob_is_said_on_the_command_line():
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from hdrq.cli import app

    knobs = {row["knob"]: row for row in json.loads(CliRunner().invoke(app, ["recipes", "hdrq", "--json"]).output)}
    assert knobs.keys() == {f.name for f in fields(Recipe)} - {"name"} and all(row["text"] for row in knobs.values())
    assert (knobs["weight_lr"]["paper"], knobs["weight_lr"]["official"]) == (1e-3, 1e-4)
    table = CliRunner().invoke(app, ["recipes", "qdrop"], env={"COLUMNS": "120"}).output
    assert "range_samples" in table and "256" in table and "QDrop (Wei et al., ICLR 2022)" in table
    assert "AWQ (Lin et al., MLSys 2024)" in CliRunner().invoke(app, ["recipes"]).output
    wrong = CliRunner().invoke(app, ["recipes", "hdrk"])
    assert wrong.exit_code == 2 and "recipe must be one of 'rtn'" in wrong.stderr
