"""The wheel, built and run outside the tree; and the install of a machine with no compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import hdrq

pytest.importorskip("pybind11")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree")


def build_and_install(tmp_path, **environment):
    """The folder of the wheel, built from a copy of the tree and installed, and what the build printed.

    Where this machine has compiled the extension already, setuptools finds it newer than its sources and packs it.
    """
    source, wheels, site = (tmp_path / name for name in ("source", "wheels", "site"))
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)
    if "CXX" not in environment and hdrq.available_backends()["cpp"] is None:
        from hdrq import _C

        library = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/hdrq"
        (source / library).mkdir(parents=True)
        shutil.copyfile(_C.__file__, source / library / Path(_C.__file__).name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    built = subprocess.run(build, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("hdrq-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", site, wheel], check=True, cwd=tmp_path)
    return site, built.stdout + built.stderr


def run_installed(site, tmp_path, script):
    """What a script prints that imports the installed package, far from the tree."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


SCRIPT = """
import sys
# An editable installation of the tree would lend what the wheel lacks.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import torch, hdrq, importlib.util
from hdrq.benchmarks.harness import families
from hdrq.demo.model import load_model
print("noise" in families())
built = hdrq.available_backends()["cpp"] is None
print(hdrq.__file__, built, importlib.util.find_spec("hdrq.kernels.noise") is not None)
x = torch.linspace(-1, 1, 1000)
print(hdrq.ops.noise_quantize(x, torch.ones(1), -8, 7, hdrq.rng_state(1)).double().sum().item())
print(load_model("source")(torch.zeros(1, 3, 32, 32)).shape[1])
"""


def test_the_wheel_runs_outside_the_tree(tmp_path):
    site, printed = build_and_install(tmp_path)
    assert "-ffp-contract=off" not in printed or hdrq.available_backends()["cpp"] is not None  # nothing was compiled
    benches, where, compiled, kernels, total, classes = run_installed(site, tmp_path, SCRIPT)
    assert Path(where).is_relative_to(site) and Path(where).with_name("py.typed").is_file()
    assert (benches, compiled, kernels, classes) == ("True", "True", "True", "10")

    # The same number in plain PyTorch, from a machine that has no compiler.
    site, printed = build_and_install(tmp_path / "plain", CC="no-such-compiler", CXX="no-such-compiler")
    assert printed.count("hdrq: the C++ path is missing") == 1
    *_, compiled, _, plain_total, _ = run_installed(site, tmp_path, SCRIPT)
    assert (compiled, plain_total) == ("False", total)


def build_extension(tmp_path, *options, **environment):
    """Build csrc alone, from a copy."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    command = [sys.executable, "setup.py", "build_ext", *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)


def test_a_build_may_require_the_extension(tmp_path):
    """As wheels do (pyproject.toml), which would be slow for all who take them."""
    built = build_extension(tmp_path, CC="no-such-compiler", CXX="no-such-compiler", HDRQ_EXTENSION="required")
    assert built.returncode != 0 and "no-such-compiler" in built.stderr


def test_msvc_is_refused_before_it_compiles(tmp_path):
    built = build_extension(tmp_path, "--compiler=msvc")
    (line,) = (line for line in built.stderr.splitlines() if line.startswith("hdrq:"))
    assert built.returncode == 0 and "which MSVC does not have" in line
