"""``hdrq merge`` and ``hdrq inspect``: from files to a file, the same bytes from every backend and from Python."""

import io
import json

import pytest
import torch
from helpers import backend_params, merged_content, same, state
from networks import SAMPLES, mergeable, quantized

import hdrq
from hdrq.checkpoint import format
from hdrq.merging import rules as baselines
from hdrq.merging.files import merge_files, readiness
from hdrq.quantizers.layers import quantized_layers

for package in ("typer", "rich", "safetensors", "matplotlib"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from hdrq.cli import app  # noqa: E402
from hdrq.report.tables import readiness_table  # noqa: E402


@pytest.fixture(scope="module")
def models():
    return [quantized(seed) for seed in range(3)]


@pytest.fixture
def files(models, tmp_path):
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for model, path in zip(models, paths, strict=True):
        hdrq.save(model, path, architecture="networks:mergeable")
    return paths


def call(command, *arguments):
    """Networks of several seeds are not ready to be merged, which is no matter but where it is asked."""
    force = ["--force"] if command == "merge" and "-o" in arguments else []
    return CliRunner().invoke(app, [command, *map(str, arguments), *force])


def test_models_that_are_not_ready_are_refused_unless_forced(files, tmp_path):
    arguments = ["merge", *map(str, files), "-o", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "models must be ready to be merged, got not ready: models are 1." in result.stderr
    assert "--force" in result.stderr and not (tmp_path / "merged").exists()
    with pytest.warns(UserWarning, match=r"models are merged that are not ready: models are 1\."):
        merge_files(files, tmp_path / "merged")
    with pytest.warns(UserWarning, match="models are merged that are not ready"):
        hdrq.merge([hdrq.load(path, mergeable(5)) for path in files])
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    alike = CliRunner().invoke(app, ["merge", str(files[0]), str(files[0]), "-o", str(tmp_path / "same")])
    assert alike.exit_code == 0, alike.output


@pytest.mark.parametrize("backend", backend_params())
def test_every_backend_writes_what_saving_a_merge_in_memory_would(backend, models, files, tmp_path):
    with hdrq.use_backend(backend):
        result = call("merge", *files, "-o", tmp_path / "merged", "--draws", 3, "--weights", "0.5,0.25,0.25")
    assert result.exit_code == 0 and result.output == ""
    loaded = [hdrq.load(path, mergeable(5)) for path in files]
    merged = hdrq.merge(loaded, draws=3, weights=(0.5, 0.25, 0.25))
    hdrq.save(merged, tmp_path / "in memory")
    assert merged_content(tmp_path / "merged") == merged_content(tmp_path / "in memory")
    restored = hdrq.load(tmp_path / "merged", mergeable(7))
    assert torch.equal(restored(SAMPLES), hdrq.merge(models, draws=3, weights=(0.5, 0.25, 0.25))(SAMPLES))
    assert restored.hdrq_origin["architecture"] == {"factory": "networks:mergeable", "arguments": {}}


def test_merged_files_merge(files, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert call("merge", *files, "-o", first, "--mode", "fast").exit_code == 0
    assert call("merge", first, files[2], "-o", second, "--noise", "odd", "--select", "official").exit_code == 0
    assert hdrq.load(second, mergeable(5))(SAMPLES).isfinite().all()


@pytest.mark.parametrize("rule", baselines.RULES)
def test_baselines_of_whole_models(rule, models, files, tmp_path):
    assert call("merge", *files[:2], "-o", tmp_path / "merged", "--rule", rule).exit_code == 0
    merged = hdrq.load(tmp_path / "merged", mergeable(5))
    inputs = [quantized_layers(model)["b"] for model in models[:2]]
    codes = [layer.weight_quantizer.codes(layer.latent) for layer in inputs]
    want = baselines.merge_rule(codes, [layer.weight_quantizer.scale for layer in inputs], -8, 7, rule)
    layer = quantized_layers(merged)["b"]
    assert torch.equal(layer.weight_quantizer.codes(layer.latent), want.codes)
    assert torch.equal(layer.weight_quantizer.scale, want.scale)


def test_layers_are_read_as_they_are_written(files, tmp_path, monkeypatch):
    """A few tensors of memory: a layer's codes are read after those of the one before were written."""
    events = []
    read, write = format.Reader.tensor, format.Writer.write
    monkeypatch.setattr(format.Reader, "tensor", lambda self, n: (events.append(("read", n)), read(self, n))[1])
    monkeypatch.setattr(format.Writer, "write", lambda self, n, v: (events.append(("write", n)), write(self, n, v))[1])
    merge_files(files, tmp_path / "merged", draws=1)
    codes = [event for event in events if event[1].endswith("codes")]
    assert codes == [(e, f"{n}.weight.codes") for n in ("a", "b", "head") for e in ("read", "read", "read", "write")]


def test_readiness_of_files_and_of_models(models, files, tmp_path):
    want = readiness(models, draws=4, seed=2)
    result = call("merge", *files, "--dry-run", "--draws", 4, "--seed", 2, "--json", "--report", tmp_path / "report")
    assert json.loads(result.stdout) == json.loads((tmp_path / "report" / "readiness.json").read_text())
    assert json.loads(result.stdout) == json.loads(json.dumps(want.as_dict()))
    assert (tmp_path / "report" / "readiness.png").stat().st_size > 10_000
    assert want.verdict.startswith("not ready") and result.exit_code == 1  # independent networks
    table = call("merge", files[0], files[0], "--dry-run", "--draws", 1)
    assert table.exit_code == 0 and "ready" in table.stdout and "head" in table.stdout
    both = call("merge", *files, "-o", tmp_path / "merged", "--draws", 4, "--seed", 2, "--json")
    assert both.exit_code == 0 and json.loads(both.stdout) == json.loads(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0.safetensors", "1.safetensors", "--device", "gpu"], "device must be one that is here, got 'gpu'"),
        (
            ["0.safetensors", "1.safetensors", "--rule", "half-up", "--mode", "no"],
            'mode must be left out but for rule "noise", got',
        ),
        (["0.safetensors", "."], "path must be a file that hdrq.save wrote, got the folder '.'"),
        (["0.safetensors"], "the number of models must be in [2, 64], got 1"),
        (["0.safetensors", "none"], "none"),
        (["0.safetensors", "text"], "path must be a file that hdrq.save wrote, got 'text'"),
        (["0.safetensors", "cut"], "path must be a file that hdrq.save wrote, got 'cut'"),
        (["0.safetensors", "wide"], "(7,) torch.float32 in wide)"),
        (["0.safetensors", "1.safetensors", "--weights", "0.5,0.6"], "weights must sum to 1, got 1.1"),
        (["0.safetensors", "1.safetensors", "--weights", "1.5,-0.5"], "weights[0] must be finite and in [0, 1]"),
        (["0.safetensors", "1.safetensors", "--weights", "half"], "weights must be numbers between commas, got 'half'"),
        (["0.safetensors", "1.safetensors", "--draws", "0"], "draws must be in"),
        (["0.safetensors", "1.safetensors", "--rule", "up"], "rule must be one of 'systematic', 'noise'"),
        (["0.safetensors"] * 5 + ["--mode", "fast"], 'mode must be "exact" but for 4 tensors or less'),
        (["0.safetensors", "1.safetensors", "--dry-run"], "out must be given, or --dry-run, and not both"),
    ],
)
def test_bad_input_leaves_no_file(arguments, message, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("nothing")
    (tmp_path / "cut").write_bytes(files[0].read_bytes()[:-7])
    hdrq.save(quantized(0, width=7), tmp_path / "wide")
    before = sorted(tmp_path.iterdir())
    result = call("merge", *arguments, "-o", "merged")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_extrapolation_does_not_write_what_cannot_be_loaded(models, files, tmp_path):
    wide = hdrq.load(files[1], mergeable(5))
    wide.b.input_quantizer.scale.data.mul_(4)
    hdrq.save(wide, files[1])
    result = call("merge", *files[:2], "-o", tmp_path / "m", "--weights", "1.4,-0.4", "--extrapolate")
    assert result.exit_code == 2 and "the mean scale of an input must be positive and finite, got -" in result.stderr


def test_names_may_hold_what_looks_like_markup(tmp_path):
    model = torch.nn.Sequential(torch.nn.ModuleDict({"b[/b]": torch.nn.Linear(4, 4)})["b[/b]"]).eval()
    model.add_module("[red]", torch.nn.Linear(4, 2))
    for k in range(2):
        hdrq.save(hdrq.quantize(model, torch.randn(9, 4), "rtn"), tmp_path / f"{k}")
    assert "[red]" in call("inspect", tmp_path / "0").stdout
    assert "[red]" in call("merge", tmp_path / "0", tmp_path / "1", "--dry-run").stdout


def test_extrapolation_is_asked_for(files, tmp_path):
    assert call("merge", *files[:2], "-o", tmp_path / "m", "--weights", "1.2,-0.2", "--extrapolate").exit_code == 0
    assert hdrq.load(tmp_path / "m", mergeable(5)).hdrq_origin["merge"]["extrapolate"]


def test_a_file_that_is_merged_with_itself_is_told(files, tmp_path):
    (tmp_path / "link").symlink_to(files[0])
    for arguments in (("-o", tmp_path / "m"), ("--dry-run",)):
        with pytest.warns(UserWarning, match="one file is merged more than once: .*link"):
            assert call("merge", files[0], tmp_path / "link", *arguments).exit_code == 0


def test_a_scale_that_is_none_is_named_with_its_file(files, tmp_path):
    with format.Reader(files[1]) as file:
        manifest, values = file.manifest, {key: file.tensor(key) for key in file.specs}
    values["b.weight.scale"] = torch.zeros_like(values["b.weight.scale"])
    with format.Writer(files[1], {key: (t.dtype, tuple(t.shape)) for key, t in values.items()}, manifest) as file:
        for key, tensor in values.items():
            file.write(key, tensor)
    result = call("merge", *files, "-o", tmp_path / "m")
    message = f"b.weight.scale in {files[1]} must be positive and finite, got 0.0"
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "m").exists()


def test_a_narrow_terminal_cuts_no_number_short(files, monkeypatch):
    """Columns that have no room go on in the next line."""
    found = readiness(files)
    for width in (80, 50):
        narrow = Console(width=width, file=io.StringIO())
        narrow.print(readiness_table(found))
        text = narrow.file.getvalue()
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        assert f"{sum(layer.elements for layer in found.layers):,}" in text


def test_inspect_says_what_is_there(files, tmp_path):
    found = json.loads(call("inspect", files[0], "--json").stdout)
    assert [(x["name"], x["bits"], x["input_bits"], x["scales"]) for x in found["layers"]] == [
        ("a", 8, 8, 1),
        ("b", 4, 4, 1),
        ("head", 8, 8, 1),
    ]
    assert found["layers"][1]["stored"] == 6 * 6 * 9 // 2 + 4 and found["layers"][1]["full"] == 6 * 6 * 9 * 4
    assert found["size"] == files[0].stat().st_size and found["ratio"] == found["full"] / found["size"]
    assert found["facts"]["recipe"] == "rtn" and found["facts"]["architecture"] == "networks:mergeable"
    table = call("inspect", files[0])
    assert table.exit_code == 0 and "W4A4" in table.stdout and "rtn" in table.stdout
    assert call("merge", *files, "-o", tmp_path / "m", "--draws", 1).exit_code == 0
    told = call("inspect", tmp_path / "m").stdout
    assert "merged: draws 1" in told and told.count("quantized: recipe rtn") == 3


def test_inspect_checks_every_hash(files):
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    result = call("inspect", files[0])
    assert result.exit_code == 2 and "has another hash than it was written with" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("a.weight.scale", torch.nan, "a.weight.scale must be positive and finite, got nan"),
        ("b.input.scale", 0.0, "b.input.scale must be positive and finite, got 0.0"),
        ("b.weight.codes", 0x0F, "codes of b must be in [0, 14], got [0, 15]"),
        ("gain", torch.nan, "gain must hold no NaN, got 6 in 6 elements"),
    ],
)
def test_inspect_says_which_values_are_broken(files, tmp_path, name, value, problem):
    with format.Reader(files[0]) as file:
        manifest, values = file.manifest, {key: file.tensor(key) for key in file.specs}
        specs = file.specs
    values[name] = torch.full_like(values[name], value)
    if name.endswith("codes"):
        manifest = {**manifest, "weights": {**manifest["weights"], "b": {**manifest["weights"]["b"], "range": [0, 14]}}}
    with format.Writer(tmp_path / "broken", specs, manifest) as file:
        for key, tensor in values.items():
            file.write(key, tensor)
    table, found = call("inspect", tmp_path / "broken"), call("inspect", tmp_path / "broken", "--json")
    assert table.exit_code == found.exit_code == 1 and problem in table.stdout
    assert json.loads(found.stdout)["problems"] == [problem]
    assert json.loads(call("inspect", files[0], "--json").stdout)["problems"] == []


@pytest.fixture
def calibrated(files, tmp_path, monkeypatch):
    """The words of a calibrated merge of three files, and the samples of its tasks."""
    from safetensors.torch import save_file

    monkeypatch.setattr("networks.factory", lambda: mergeable(9), raising=False)
    tasks = [SAMPLES + k for k in range(3)]
    for k, x in enumerate(tasks):
        save_file({"x": x}, tmp_path / f"data{k}.safetensors")
    data = [word for k in range(3) for word in ("--calibrate", tmp_path / f"data{k}.safetensors")]
    return (*files, *data, "-o", tmp_path / "out"), tasks


def full_disk(place):
    """Saving that finds no room at one place."""
    save = hdrq.save

    def fails_there(model, path, **options):
        if str(path) == str(place):
            raise OSError(28, f"{path} must be written to a disk with room, got No space left on device")
        save(model, path, **options)

    return fails_there


def test_a_merge_is_calibrated_by_data_of_each_model(files, tmp_path, calibrated, monkeypatch):
    from hdrq.methods.calibrated_merge import merge_calibrated

    (line, tasks) = calibrated
    data, line = line[3:9], (*line, "--target", "mean", "--weights", "0.5,0.25,0.25")
    result = call("merge", *line, "--model", "networks:factory")
    assert result.exit_code == 0 and "merge towards mean" in result.output
    models = [hdrq.load(path, mergeable(5)) for path in files]
    again = merge_calibrated(models, tasks, target="mean", weights=(0.5, 0.25, 0.25), progress=False)
    assert torch.equal(hdrq.load(tmp_path / "out", mergeable(5))(SAMPLES), again(SAMPLES))
    monkeypatch.setattr("hdrq.checkpoint.saving.save", full_disk(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    result = call("merge", *line, "--model", "networks:factory")
    (kept,) = tmp_path.glob("out-*.safetensors")
    assert result.exit_code == 2 and f"the quantized model is kept in {kept}" in result.stderr
    assert kept.read_bytes() == (tmp_path / "out").read_bytes()
    for options, message in (
        (line, "model must be given with --calibrate"),
        (
            (*line, "--rule", "noise", "--model", "networks:factory"),
            "rule must be left out in a calibrated merge, got noise",
        ),
        ((*files, "-o", tmp_path / "no", "--lam", 1), "lam must be left out without --calibrate, got 1.0"),
        ((*line, *data[:2], "--model", "networks:factory"), "calibrate must be given as often as there are models, 3"),
    ):
        result = call("merge", *options)
        assert result.exit_code and message in " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore:models are merged that are not ready", "ignore:block .* is rounded to nearest")
def test_blocks_of_a_merge_learn_from_the_models(files, tmp_path, calibrated):
    from hdrq.methods.calibrated_merge import merge_calibrated

    line, tasks = calibrated
    learned = (*line, "--model", "networks:factory", "--method", "hdrq", "--seed", 2)
    learned = (*learned, "--set", "iterations=8", "--set", "weight_lr=0.05", "--set", "distance=0")
    learned = (*learned, "--model", "networks:Mergeable", "--offload-folder", tmp_path / "offload")
    result = call("merge", *learned, "--workdir", tmp_path / "run")
    assert result.exit_code == 0 and "Loss: blocks of hdrq" in result.output, result.output
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"losses.png", "losses.csv", "run.json", "block-002.safetensors"} <= names
    models = [hdrq.load(path, mergeable(5)) for path in files]
    how = {"iterations": 8, "weight_lr": 0.05, "distance": 0.0, "seed": 2}
    again = merge_calibrated(models, tasks, method="hdrq", progress=False, **how)
    found = hdrq.load(tmp_path / "out", mergeable(5))
    assert same(state(found), state(again)) and not same(state(found), state(hdrq.merge(models, rule="half-even")))
    assert "method hdrq, seed 2" in " ".join(call("inspect", tmp_path / "out", "--history").output.split())
    for options, message in (
        ((*learned, "--workdir", tmp_path / "run"), "workdir must hold no run, or resume=True go on with it"),
        ((*learned, "--lam", 1), 'lam must be left out with method="hdrq", got 1.0'),
        ((*learned, "--method", "gptq"), "method must be one of 'closed-form', 'hdrq', 'qdrop', 'brecq', got 'gptq'"),
        ((*learned, "--set", "bits_=3"), "set must be one of "),
        ((*learned, "--set", "out=foo"), "got 'out'"),
        ((*learned, "--set", "workdir=foo"), "got 'workdir'"),
        ((*learned, "--resume"), "workdir must be the folder of the run to resume, got None"),
        ((*files, "-o", tmp_path / "no", "--method", "hdrq"), "method must be left out without --calibrate, got hdrq"),
        ((*files, "-o", tmp_path / "no", "--set", "a=1"), "set must be left out without --calibrate, got ['a=1']"),
        (
            (*files, "-o", tmp_path / "no", "--rule", "calibrated", "--workdir", tmp_path / "run"),
            "workdir must be left out in a calibrated merge without --calibrate",
        ),
        (
            (files[0], "--add", files[1], "-o", tmp_path / "no", "--method", "hdrq"),
            "method must be left out with --add, got hdrq",
        ),
    ):
        result = call("merge", *options)
        assert result.exit_code and message in " ".join(result.output.split()), result.output
    resumed = call("merge", *learned, "--workdir", tmp_path / "run", "--resume")
    assert resumed.exit_code == 0 and torch.equal(hdrq.load(tmp_path / "out", mergeable(5))(SAMPLES), again(SAMPLES))
