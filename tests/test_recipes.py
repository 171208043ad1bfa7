"""Recipes: knobs by their old names work for one release, and warn."""

import pytest

from hdrq.recipes import recipe


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("tail", "fake_quant_fraction", 0.3), ("placement", "activation_placement", "input")],
)
def test_a_knob_of_the_first_house_works_and_warns(old, new, value):
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        assert getattr(recipe("hdrq", **{old: value}), new) == value
    with pytest.raises(ValueError, match=f"{new} must be given once, got {old} too, which is its old name"):
        recipe("hdrq", **{old: value, new: value})
