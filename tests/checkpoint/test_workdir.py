"""A run that is killed and resumed ends with the bits of one that was not; nothing finished is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, learn, net

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.checkpoint.workdir import state_hash

pytest.importorskip("safetensors")

OPTIONS = {"recipe": "hdrq", "iterations": 8, "checkpoint_every": 3, "bias_lr": 1e-3}


class Killed(Exception):
    """Stands for a kill at a known place."""


def stopped(workdir, calls, **options):
    """A run that ends before its ``calls``-th checkpoint."""
    left = iter(range(calls - 1))
    replace = os.replace

    def failing(source, target):
        if str(target).endswith("current.safetensors") and next(left, None) is None:
            raise Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(Killed):
            learn(workdir=workdir, **{**OPTIONS, **options})


@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
@pytest.mark.parametrize("calls", [2, 4])
def test_stopped_inside_a_block_and_resumed(tmp_path, recipe, calls):
    options = {**OPTIONS, "recipe": recipe}
    stopped(tmp_path, calls, recipe=recipe)
    resumed, whole = learn(workdir=tmp_path, resume=True, **options), learn(**{**options, "checkpoint_every": 0})
    assert same(state(resumed), state(whole))


SCRIPT = """
    import sys, time
    sys.path.insert(0, "tests")
    import torch
    from networks import learn
    def tell(step):
        if step.index == 1 and step.iteration == 24:
            print("now", flush=True)
            time.sleep(3600)
    learn(iterations=30, checkpoint_every=8, workdir=sys.argv[1], progress=tell)
"""


def test_kill_in_the_middle_of_a_block(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "block-000.safetensors").exists() and not (tmp_path / "block-001.safetensors").exists()
    options = {"iterations": 30, "checkpoint_every": 8, "workdir": tmp_path, "resume": True}
    steps = []
    resumed = learn(**options, progress=steps.append)
    assert (steps[0].index, steps[0].iteration) == (1, 24)  # from the checkpoint of iteration 16
    assert same(state(resumed), state(learn(iterations=30)))


def test_finished_run_is_loaded(tmp_path):
    first = learn(workdir=tmp_path, **OPTIONS)
    steps = []
    again = learn(workdir=tmp_path, resume=True, progress=steps.append, **OPTIONS)
    assert same(state(first), state(again)) and not steps
    assert [b.loss_after for b in report_of(first).blocks] == [b.loss_after for b in report_of(again).blocks]
    assert report_of(first).losses == report_of(again).losses
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == "block,iteration,loss" and len(lines) == 1 + 4 * 3
    assert [line.split(",")[:2] for line in lines[1:4]] == [["0", "3"], ["0", "6"], ["0", "8"]]


def test_resume_of_nothing_begins(tmp_path):
    assert same(state(learn(workdir=tmp_path / "new", resume=True)), state(learn()))


def test_run_is_not_overwritten(tmp_path):
    learn(workdir=tmp_path)
    with pytest.raises(FileExistsError, match="workdir must hold no run, or resume=True go on with it, got one in"):
        learn(workdir=tmp_path)
    with pytest.raises(ValueError, match="workdir must be the folder of the run to resume, got None"):
        learn(resume=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 1}, r"seed \(0, now 1\)"),
        ({"iterations": 7}, r"recipe.iterations \(6, now 7\)"),
        ({"blocks": ["0", "2"]}, r"blocks \(None, now \['0', '2'\]\)"),
        ({"bits": "W4A4"}, r"bits \(W3A3, now W4A4\)"),
        ({"model": net(1)}, r"model \(\w+, now \w+\)$"),
        ({"calibration": CALIBRATION[:-1]}, r"calibration \(\w+, now \w+\)$"),
        ({"source": net(1)}, r"source \(None, now \w+\)$"),
        (
            {"weight_lr": 1e-2, "fake_quant_fraction": 0.5},
            r"recipe.fake_quant_fraction .*; recipe.weight_lr \(0.05, now 0.01\)",
        ),
    ],
)
def test_another_run_is_not_resumed(tmp_path, options, message):
    learn(workdir=tmp_path)
    with pytest.raises(ValueError, match=f"resume must have what the run in .* began with, got others: .*{message}"):
        learn(workdir=tmp_path, resume=True, **options)


def test_files_hold_no_code(tmp_path):
    learn(workdir=tmp_path, **OPTIONS)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"block-00{i}.safetensors" for i in range(4)), "losses.csv", "run.json"]  # no block is in work
    assert json.loads((tmp_path / "run.json").read_text())["recipe.iterations"] == 8


def test_damaged_checkpoint_is_refused(tmp_path):
    learn(workdir=tmp_path)
    (tmp_path / "block-001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"workdir must hold checkpoints of hdrq, got .*block-001"):
        learn(workdir=tmp_path, resume=True)


@pytest.mark.parametrize("place", [-1, -40])
def test_flipped_bit_is_refused_with_the_file(tmp_path, place):
    learn(workdir=tmp_path)
    path = tmp_path / "block-001.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"workdir must hold checkpoints of hdrq, got .*block-001.* another hash"):
        learn(workdir=tmp_path, resume=True)
    path.unlink()  # the way out that the message names
    assert same(state(learn(workdir=tmp_path, resume=True)), state(learn()))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_spoilt_run_is_refused_with_the_file(tmp_path, content):
    learn(workdir=tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"workdir must hold a run of hdrq, got .*run\.json"):
        learn(workdir=tmp_path, resume=True)


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_saving_loses_nothing(tmp_path):
    stopped(tmp_path, 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="must be written to a disk with room, got No space left on device") as error:
            learn(workdir=tmp_path, resume=True, **OPTIONS)
    assert error.value.errno == errno.ENOSPC
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert same(state(learn(workdir=tmp_path, resume=True, **OPTIONS)), state(learn(**OPTIONS)))


def test_full_disk_while_caching_loses_nothing(tmp_path):
    room, allocate = iter(range(7)), os.posix_fallocate

    def filling(*args):
        return allocate(*args) if next(room, None) is not None else full()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", filling)
        with pytest.raises(OSError, match=r"the cache's folder must have room for [\d,]+ bytes, got [\d,]+ free"):
            learn(workdir=tmp_path, cache="disk", **OPTIONS)
    assert (tmp_path / "block-000.safetensors").exists()
    assert not list(tmp_path.glob("hdrq-*"))
    assert same(state(learn(workdir=tmp_path, resume=True, **OPTIONS)), state(learn(**OPTIONS)))


def test_a_run_that_goes_on_with_other_threads_is_told_what_that_does(tmp_path, monkeypatch):
    stopped(tmp_path, 2)
    began = json.loads((tmp_path / "run.json").read_text())["threads"]
    assert began == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: began + 1)
    with pytest.warns(
        UserWarning, match=f"began with {began} threads and goes on with {began + 1}: .*OMP_NUM_THREADS={began}"
    ):
        learn(workdir=tmp_path, resume=True, **OPTIONS)


def test_divergence_keeps_the_last_good_state(tmp_path):
    with pytest.raises(hdrq.DivergenceError) as error:
        learn(iterations=60, bias_lr=1e30, workdir=tmp_path)
    found = error.value
    assert (found.block, found.layer, found.good) == ("0", "0", 0) and 1 <= found.iteration <= 50
    nearest = learn(recipe="rtn", iterations=0)
    assert same(state(found.model), state(nearest))  # no iteration was good: what was there before
    assert (tmp_path / "current.safetensors").exists()


def test_extra_state_that_is_no_tensor_counts_in_a_fingerprint():
    weight = torch.ones(2)
    states = [{"w": weight, "x": extra} for extra in (None, 1, 1.5, "1", {"a": [1]}, {"a": [2]}, {"b": [1]}, [weight])]
    assert len({state_hash(state) for state in states}) == len(states)
    assert state_hash({"x": {"a": [1, weight]}}) == state_hash({"x": {"a": [1, weight.clone()]}})
    assert state_hash({"x": object()}) == state_hash({"x": object()})  # an address would differ from run to run
    sparse = torch.eye(2).to_sparse()
    assert state_hash({"x": sparse}) != state_hash({"x": sparse * 2})
