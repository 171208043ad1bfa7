"""What importing hdrq may do: no module asks the package root for anything, and the root loads no tool of a user's."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hdrq

PACKAGE = Path(hdrq.__file__).parent
SUBMODULES = {path.stem for path in PACKAGE.iterdir() if path.suffix in (".py", ".so") or path.is_dir()} | {"_C"}


def root_imports(source: str) -> list[str]:
    """What a module imports from the package root that is no submodule of it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name == "hdrq"]
        if isinstance(node, ast.ImportFrom) and node.module == "hdrq":
            found += [alias.name for alias in node.names if alias.name not in SUBMODULES]
    return found


def test_no_module_imports_the_package_root():
    assert root_imports("import hdrq\nfrom hdrq import __version__, checks") == ["hdrq", "__version__"]
    found = {str(path): root_imports(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


TOOLS = ("hdrq.parity", "hdrq.cli", "matplotlib", "typer", "rich", "yaml", "PIL")


@pytest.mark.parametrize("before", ["", "import os, sys; sys.modules['resource'] = None; del os.sysconf"])
def test_import_loads_no_tool_and_needs_no_unix(before):
    script = f"{before}\nimport sys, hdrq\nprint([name for name in {TOOLS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WITHOUT_EXTRAS = """
import sys
for name in ("safetensors", "matplotlib", "PIL", "yaml", "rich", "scipy", "typer", "sklearn", "onnx", "torchao"):
    sys.modules[name] = None
import torch, hdrq
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)).eval()
x = torch.randn(16, 4)
quantized = hdrq.quantize(model, x, "qdrop", iterations=2, progress=False)
print(hdrq.evaluate.accuracy(hdrq.merge([quantized, quantized]), x, torch.zeros(16, dtype=torch.int64)) >= 0)
hdrq.save(quantized, "a")
for call in (
    lambda: hdrq.load("a", model), lambda: hdrq.load_float(lambda: model, "a"),
    lambda: hdrq.quantize(model, x, "qdrop", workdir="w"),
):
    try:
        call()
    except hdrq.errors.MissingExtra as error:
        print(error)
"""


def test_torch_and_numpy_are_all_that_the_core_needs(tmp_path):
    run = [sys.executable, "-W", "ignore", "-c", WITHOUT_EXTRAS]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=False)
    refusal = 'files of models need safetensors, which is not installed: pip install "hdrq[files]"'
    assert done.stdout.splitlines() == ["True"] + 3 * [refusal], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from hdrq.model import quantized_layers", "hdrq.model is hdrq.quantizers now"),
        ("from hdrq.data import load_data, load_labelled, class_names", "hdrq.data is hdrq.calibrate.images now"),
        ("import hdrq.reconstruct; hdrq.reconstruct.fold", "hdrq.reconstruct is hdrq.methods.post_training now"),
        ("import hdrq; hdrq.backends()['torch']", r"hdrq.backends\(\) is hdrq.available_backends\(\) now"),
        ("import hdrq; hdrq.Diverged", "hdrq.Diverged is hdrq.DivergenceError now"),
    ],
)
def test_names_of_the_first_house_work_and_warn(statement, message):
    for name in ("hdrq.model", "hdrq.data", "hdrq.reconstruct"):
        sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=message):
        exec(statement, {})


def test_names_that_never_moved():
    from hdrq.merging import merge_files, readiness
    from hdrq.report import report_of

    assert callable(merge_files) and callable(readiness) and callable(report_of) and callable(hdrq.report.report_of)
