"""``hdrq quantize`` with several YAML files: a model each, in processes of their own."""

import json
import os
from pathlib import Path

import pytest
import torch
from cli.quantizing import OPTIONS, call

MODULE = """
import os, signal
from multiprocessing import parent_process

import torch
from tinynet import tiny

def watched(name=""):
    if parent_process() is not None:
        with open("threads", "a") as file:
            file.write(f"{name} {torch.get_num_threads()}\\n")
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "fails":
            raise ArithmeticError("no such luck")
    return tiny()
"""
SHARED = {
    **{name: OPTIONS[name] for name in ("weights", "data")},
    **{"model": "jobsnet:watched", "recipe": "qdrop", "iterations": 4, "resize": 20, "crop": 16},
}


@pytest.fixture
def configs(place):
    """Writes files of settings, by name; each has an output and a work folder of its own."""
    (place / "jobsnet.py").write_text(MODULE)

    def write(**runs):
        for name, settings in runs.items():
            own = {"out": f"{name}.safetensors", "workdir": f"work/{name}"}
            (place / f"{name}.yaml").write_text(json.dumps({**SHARED, **own, **settings}))  # JSON is YAML
        return [f"{name}.yaml" for name in runs]

    return write


def test_one_file_may_be_all_that_a_pattern_finds(configs, place):
    (file,) = configs(alone={"model": "tinynet:tiny"})
    result = call(file, "--jobs", "4")
    assert result.exit_code == 0 and (place / "alone.safetensors").is_file(), result.output


def test_a_run_that_fails_and_one_that_is_killed_stop_no_other(configs, place, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    files = configs(**{name: {"model_args": {"name": name}} for name in ("killed", "fails", "good")})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        result = call(*files, "--jobs", "2", "--json")
    assert result.exit_code == 2, result.output
    killed, fails, good = json.loads(result.stdout)
    assert [record["name"] for record in (killed, fails, good)] == files
    assert killed["error"] == "its process ended by SIGKILL; where memory is short, fewer jobs need less"
    assert fails["error"].endswith("got ArithmeticError: no such luck")
    for record in (killed, fails):
        assert f"hdrq: {record['name']}: {record['error']}\n" in result.stderr
        assert not Path(record["out"]).exists() and "errors" not in record

    assert set((place / "threads").read_text().splitlines()) == {"killed 1", "fails 1", "good 1"}
    assert "OMP_NUM_THREADS" not in os.environ
    said = [line.partition(": loss ")[0] for line in capfd.readouterr().err.splitlines() if ": loss " in line]
    assert said == [f"good.yaml: block {block}" for block in ("1 of 3, 0", "2 of 3, 2", "3 of 3, 5")]
    assert {"losses.png", "losses.csv"} <= {path.name for path in (place / "work" / "good").iterdir()}
    assert_as_alone(place, good)


def assert_as_alone(place, record):
    """The file and the record are those of a run by itself with one thread."""
    made, before = (place / "good.safetensors").read_bytes(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = call("good.yaml", "--json", "--set", "workdir=null")
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    assert (place / "good.safetensors").read_bytes() == made
    (alone,) = json.loads(result.stdout)
    for key in ("name", "out", "error", "bits", "nearest", "errors", "coverage"):
        assert alone[key] == record[key]
    assert [block["loss_after"] for block in alone["blocks"]] == [block["loss_after"] for block in record["blocks"]]


@pytest.fixture
def no_process(monkeypatch):
    """What is refused is refused before any run begins."""

    def forbidden(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr("hdrq.cli.jobs._start", forbidden)


REFUSED = [  # settings of one run, of another, options of the command, and the message
    ({}, {"out": "./a.safetensors"}, [], "out must be another for each run, got './a.safetensors' for a.yaml and "),
    ({}, {"workdir": "work/../work/a"}, [], "workdir must be another for each run, got 'work/../work/a' for a.yam"),
    ({}, {}, ["--out", "q.safetensors"], "out must be another for each run, got 'q.safetensors' for a.yaml and fo"),
    ({}, {"out": None}, [], "out must be given for each of several runs, got none for b.yaml"),
    ({"weights": "b.safetensors"}, {}, [], "weights of a.yaml must be there before the runs, got 'b.safetensors',"),
    ({}, {"seed": -1}, [], "b.yaml: seed must be in [0, "),
    ({}, {"graph": "maybe"}, [], "b.yaml: graph must be one of"),
    ({}, {"cache": "tape"}, [], "b.yaml: cache must be one of"),
    ({}, {"statistics": 0}, [], "b.yaml: statistics must be "),
    ({}, {"resume": True, "workdir": None}, [], "b.yaml: workdir must be the folder of the run to resume, got"),
    ({}, {"data": "nowhere"}, [], "b.yaml: data must be a folder or a file, got nowhere"),
    ({}, {"crop": 10}, [], "b.yaml: model must run on calibration, got RuntimeError from model((1, 3, 10, 10)"),
    ({}, {"workdir": "full"}, [], "b.yaml: workdir must hold no run, or resume=True go on with it, got one in fu"),
    ({"held_out": 2}, {"weights": "none"}, [], "a.yaml: held_out must be finite and in [0, 0.5], got 2; b.yaml: w"),
    ({}, {"tale": 1}, [], "b.yaml: setting must be one of"),
    ({}, {}, ["--ablate"], "config must be one file with --ablate, got 2"),
    ({}, {}, ["--save-config", "all.yaml"], "config must be one file with --save-config, got 2"),
    ({}, {}, ["--jobs", "0"], "jobs must be in [1, 1024], got 0"),
    ({}, {}, ["a.yaml"], "config must be another file for each model, got a.yaml; b.yaml; a.yaml"),
]


def test_every_setting_of_every_run_is_checked_first(configs, place, no_process):
    (place / "full").mkdir()
    (place / "full" / "run.json").write_text("{}")
    for one, other, arguments, message in REFUSED:
        result = call(*configs(a=one, b=other), *arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert result.stderr.count("\n") == 1 and not list(place.glob("[ab].safetensors"))


def test_processes_share_what_memory_is_free(monkeypatch, place):
    from hdrq.cli import jobs
    from hdrq.methods.job import Run

    monkeypatch.setattr(jobs, "half_of_free", lambda device: {"device": 900, "host": 600})
    run = Run(model="tinynet:tiny", data="images")
    assert jobs._sharing(run, 3).cache_bytes == 200
    assert jobs._sharing(run, 1).cache_bytes is None
    given = Run(model="tinynet:tiny", data="images", cache_bytes=5)
    assert jobs._sharing(given, 3).cache_bytes == 5


def test_the_table_has_a_line_for_each_model():
    from rich.console import Console

    from hdrq.calibrate.report import RunReport
    from hdrq.methods.job import Run
    from hdrq.report.tables import run_record, runs_table

    report = RunReport("hdrq", nearest={"output": 0.5}, errors={"output": 0.25}, seconds=61.0)
    report.peak_memory = {"host": 3 << 20}
    runs = {name: Run(model="m:f", data="x", out=f"{name}.safetensors") for name in ("art[1]", "clipart")}
    records = [
        run_record("art[1]", runs["art[1]"], report),
        run_record("clipart", runs["clipart"], error="loss [of] block"),
    ]
    console = Console(width=120)
    with console.capture() as printed:
        console.print(runs_table(records))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.get().splitlines() if "│" in line]
    assert rows == [
        ["art[1]", "W4A4", "0.5", "0.25", "61", "3", "art[1].safetensors"],
        ["clipart", "W4A4", "", "", "", "", "loss [of] block"],
    ]
