"""The settings of a merge: those that make no sense are refused."""

import pytest

import hdrq
from hdrq.merging.settings import MergeSettings


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"weights": (0.5, 0.6)}, ValueError, "weights must sum to 1, got 1.1"),
        ({"weights": (1.5, -0.5)}, ValueError, r"weights\[0\] must be finite and in \[0, 1\], got 1.5"),
        ({"weights": (1.0,)}, ValueError, "weights must be as many as the models, 2, got 1"),
        ({"draws": 0}, ValueError, "draws must be in"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"noise": "some"}, ValueError, "noise must be one of 'all', 'odd', 'none', got 'some'"),
        ({"rule": "coin"}, ValueError, "rule must be one of 'systematic', 'noise', 'half-even'"),
        ({"tau": 0.7}, ValueError, r"tau must be finite and in \[0, 0.5\], got 0.7"),
        (
            {"tau": 0.2, "draws": 3},
            ValueError,
            'tau must be left out but for rule "systematic", got 0.2 for rule "noise"',
        ),
        ({"rule": "half-up", "draws": 3}, ValueError, 'draws must be left out but for rule "noise", got 3'),
        ({"tua": 0.2}, ValueError, "an option must be one of 'bits', 'draws', .*'weights', got 'tua'"),
        ({"bits": "W4"}, ValueError, 'bits must be written like "W4A4", got'),
        ({"preset": "author"}, ValueError, "preset must be one of 'paper', 'official', got 'author'"),
        ({"weights": (1.5, 0.5), "extrapolate": True}, ValueError, 'weights must sum to 1, got 2; rule="requantize"'),
        ({"rule": "half-up", "extrapolate": True}, ValueError, "rule must be one that extrapolates, got 'half-up'"),
    ],
)
def test_bad_options_are_refused(models, options, error, message):
    with pytest.raises(error, match=message):
        hdrq.merge(models[:2], **options)


def test_models_are_a_list_of_models(models):
    for given, name in ((None, "NoneType"), (models[0], type(models[0]).__name__)):
        with pytest.raises(TypeError, match=f"models must be a list of quantized models, got {name}"):
            hdrq.merge(given)


def test_an_option_of_the_noise_asks_for_noise_and_nothing_for_systematic_rounding():
    assert MergeSettings().rule == "systematic" and MergeSettings().draws is None
    noise = MergeSettings(draws=8)
    assert (noise.rule, noise.draws, noise.noise, noise.select, noise.mode) == (
        "noise",
        8,
        "all",
        "min-cosine",
        "exact",
    )
    assert MergeSettings(noise="odd").draws == 30


def test_presets():
    paper, official = (MergeSettings.of(2, preset) for preset in ("paper", "official"))
    assert (paper.rule, paper.draws, paper.noise) == ("noise", 30, "all")
    assert (official.draws, official.noise, official.select) == (100, "odd", "official")
    assert MergeSettings.of(3, "paper").rule == "half-even"
    assert MergeSettings.of(2, "official", draws=5).draws == 5
    with pytest.raises(ValueError, match='preset must be None or "paper" for 3 models, got "official"'):
        MergeSettings.of(3, "official")
