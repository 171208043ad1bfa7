"""Merges written down in a YAML file, and sweeps over the weight."""

import pytest
import torch
from networks import mergeable, quantized

import hdrq

for package in ("typer", "rich", "safetensors", "yaml"):
    pytest.importorskip(package)

from typer.testing import CliRunner  # noqa: E402

from hdrq.cli import app  # noqa: E402
from hdrq.merging.files import merge_files  # noqa: E402
from hdrq.methods.merge_recipe import read_recipe, sweep  # noqa: E402

RECIPE = """
models:
  - model: a.safetensors
    parameters:
      weight:
        - {filter: he, value: 3}
        - {filter: "a*", value: 0}
        - value: 1
  - model: b.safetensors
merge_method: linear
parameters: {rule: half-even, seed: 3}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        hdrq.save(quantized(seed), f"{name}.safetensors")
    return tmp_path


def written(folder, text):
    (folder / "merge.yaml").write_text(text)
    return "merge.yaml"


def loaded(path):
    return hdrq.load(path, mergeable(0)).state_dict()


def assert_same(one, other):
    a, b = loaded(one), loaded(other)
    assert all(torch.equal(value, b[name]) for name, value in a.items() if torch.is_tensor(value))


def test_filters_give_modules_their_weights(folder):
    found = read_recipe(written(folder, RECIPE))
    assert found.files == ("a.safetensors", "b.safetensors")
    assert {name: found.options["weights"][name] for name in ("head", "a", "b", "norm", "*")} == {
        "head": (0.75, 0.25),
        "a": (0.0, 1.0),
        "b": (0.5, 0.5),
        "norm": (0.5, 0.5),
        "*": (0.5, 0.5),
    }
    assert (found.options["rule"], found.options["seed"]) == ("half-even", 3)


def test_the_command_merges_as_the_recipe_says(folder):
    config = written(folder, RECIPE)
    result = CliRunner().invoke(app, ["merge", config, "-o", "out.safetensors", "--force"])
    assert result.exit_code == 0, result.output
    by_module = {"head": (0.75, 0.25), "a": (0.0, 1.0), "*": (0.5, 0.5)}
    merge_files(["a.safetensors", "b.safetensors"], "want.safetensors", weights=by_module, rule="half-even", seed=3)
    assert_same("out.safetensors", "want.safetensors")


def test_options_win_over_the_recipe(folder):
    config = written(folder, "models: [{model: a.safetensors}, {model: b.safetensors}]\nparameters: {seed: 3}\n")
    options = ["--rule", "noise", "--seed", "5", "--weights", "0.75,0.25", "--force"]
    result = CliRunner().invoke(app, ["merge", config, "-o", "out.safetensors", *options])
    assert result.exit_code == 0, result.output
    merge_files(["a.safetensors", "b.safetensors"], "want.safetensors", weights=(0.75, 0.25), rule="noise", seed=5)
    assert_same("out.safetensors", "want.safetensors")


def test_weights_that_are_not_normalized_must_sum_to_one(folder):
    text = "models: [{model: a.safetensors}, {model: b.safetensors}]\nparameters: {normalize: false}\n"
    found = read_recipe(written(folder, text))
    with pytest.raises(ValueError, match="weights must sum to 1, got 2"):
        merge_files(found.files, "out.safetensors", **found.options)


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("models: []", ValueError, "models must be a list"),
        ("model: a", ValueError, "recipe must have merge_method; models; parameters, got 'model'"),
        ("models: [a.safetensors]", TypeError, "an entry of models must be a mapping, got str"),
        ("models: [{model: 3}]", TypeError, "model must be the name of a file, got 3"),
        (
            "models: [{model: a, parameters: {density: 0.5}}]",
            ValueError,
            "parameters of a must have weight, got 'density'",
        ),
        ("models: [{model: a, parameters: {weight: [0, 1]}}]", TypeError, "weight of a must be a number, or a list of"),
        ("models: [{model: a, parameters: {weight: x}}]", TypeError, "weight of a must be a number, got str"),
        (
            "models: [{model: a, parameters: {weight: [{filter: stem, value: 1}]}}]",
            ValueError,
            "weight of a must end with a value that has no filter",
        ),
        (
            "models: [{model: a}]\nmerge_method: ties",
            ValueError,
            "merge_method must be linear for integers, got 'ties'",
        ),
        ("models: [{model: a}]\nparameters: {normalise: true}", ValueError, "parameters must have .* got 'normalise'"),
        ("models: [{model: a}]\nparameters: {normalize: 1}", TypeError, "normalize must be true or false, got 1"),
        ("models: [{model: none.safetensors}]", FileNotFoundError, "none.safetensors"),
        (RECIPE.replace("he,", "nowhere,"), ValueError, "filter must be part of the name of a module .* got 'nowhere'"),
        (
            "models: [{model: a.safetensors}, {model: b.safetensors, parameters: {weight: -1}}]",
            ValueError,
            r"weights must have a sum to divide by, got \[1.0, -1.0\]",
        ),
        (
            "models: [{model: a.safetensors, parameters: {weight: 0.3}}, {model: b.safetensors, parameters: "
            "{weight: -0.1}}, {model: b.safetensors, parameters: {weight: -0.2}}]",
            ValueError,
            "weights must have a sum to divide by",
        ),
    ],
)
def test_bad_recipes_are_refused(folder, text, error, message):
    with pytest.raises(error, match=message):
        read_recipe(written(folder, text))


def test_a_sweep_writes_a_file_for_each_weight(folder):
    result = CliRunner().invoke(
        app, ["merge", "a.safetensors", "b.safetensors", "--sweep", "0.25,1", "-o", "swept", "--force"]
    )
    assert result.exit_code == 0, result.output
    for share in (0.25, 1):
        merge_files(["a.safetensors", "b.safetensors"], "want.safetensors", weights=(share, 1 - share))
        assert_same(folder / "swept" / f"lambda-{share}.safetensors", "want.safetensors")
    assert sorted(path.name for path in (folder / "swept").iterdir()) == [
        "lambda-0.25.safetensors",
        "lambda-1.safetensors",
    ]


def test_a_rule_of_the_command_line_is_in_the_place_of_the_recipes(folder):
    text = "models: [{model: a.safetensors, parameters: {weight: 3}}, {model: b.safetensors}]\n"
    config = written(folder, text + "parameters: {rule: noise, draws: 5, seed: 3}\n")
    options = ["--rule", "half-even", "--force"]
    result = CliRunner().invoke(app, ["merge", config, "-o", "out.safetensors", *options])
    assert result.exit_code == 0, result.output
    merge_files(["a.safetensors", "b.safetensors"], "want.safetensors", weights=(0.75, 0.25), rule="half-even", seed=3)
    assert_same("out.safetensors", "want.safetensors")


def test_a_recipe_is_no_sweep(folder):
    config = written(folder, "models: [{model: a.safetensors}, {model: b.safetensors}]\n")
    result = CliRunner().invoke(app, ["merge", config, "--sweep", "0.5", "-o", "swept"])
    assert result.exit_code == 2 and "sweep must be of two files, got the recipe merge.yaml" in result.output


def test_a_sweep_of_files_that_are_not_there_leaves_nothing(folder):
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        sweep(["a.safetensors", "c.safetensors"], folder / "swept", (0.5,))
    with pytest.raises(ValueError, match="rule must be one of"):
        sweep(["a.safetensors", "b.safetensors"], folder / "swept", (0.5,), rule="best")
    assert not (folder / "swept").exists()


def test_weights_that_are_alike_in_six_digits_have_files_of_their_own(folder):
    assert len(set(sweep(["a.safetensors", "b.safetensors"], folder, (0.3333333, 0.3333334)))) == 2


@pytest.mark.parametrize(
    "files, values, message",
    [
        (3, (0.5,), "a sweep must be of two models, got 3"),
        (2, (), "sweep must be one λ or more, each once"),
        (2, (0.5, 0.5), "sweep must be one λ or more, each once"),
        (2, (0.5, 1.5), r"sweep must be finite and in \[0, 1\], got 1.5"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_is_written(folder, files, values, message):
    with pytest.raises(ValueError, match=message):
        sweep(["a.safetensors"] * files, folder / "swept", values)
    assert not (folder / "swept").exists()
