"""The documentation: its Python runs, its commands parse, its links lead somewhere, its file format is hdrq's.

Pages on one family have tests beside it: drop-in (tests/compat), adapters (tests/merging), qat (tests/qat), export and
folders (tests/export). The block of docs/distributed.md needs several processes, as tests/methods/test_distributed.py
has them.
"""

import importlib
import importlib.util
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import checkpoint_vectors
from torch import nn

import hdrq
from hdrq.quantizers.layers import quantized_layers

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not run from a source tree")
ROOTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [ROOT / name for name in ROOTS] + sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [block for language, block in BLOCK.findall(text_of(page)) if language in languages]


def network(seed: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def of_the_reader() -> dict:
    """What the README's blocks take for granted: models adapted from one source, with data and labels, and a loop."""
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))

    def reconstruct(*_):
        from qdrop import loop

        return loop.reconstruct()

    return {
        "hdrq": hdrq,
        "adapted": [(network(seed), images) for seed in (1, 2, 3)],
        "source": network(0),
        "architecture": network(0),
        "x": images,
        "labels": labels,
        "reconstruct": reconstruct,
    }


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with the files that pages read, and with a package of quantizer functions called qdrop."""
    vectors = tmp_path / "tests" / "golden"
    vectors.mkdir(parents=True)
    shutil.copy(checkpoint_vectors.FILE, vectors)
    (tmp_path / "qdrop").mkdir()
    for module in (ROOT / "tests" / "standin").glob("*.py"):
        (tmp_path / "qdrop" / module.name).write_text(module.read_text().replace("from standin", "from qdrop"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "qdrop"]:
        del sys.modules[name]


@pytest.fixture
def few_iterations(monkeypatch):
    from hdrq.methods import post_training

    original = post_training.make_recipe

    def short(*args, **knobs):
        plan = original(*args, **knobs)
        return replace(plan, iterations=min(plan.iterations, 3))

    monkeypatch.setattr(post_training, "make_recipe", short)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        *("README", "docs/quickstart", "docs/merging", "docs/throughput", "docs/parity", "docs/recipes"),
        *("docs/contract", "docs/budgets", "docs/post-merge", "docs/memory"),
    ],
)
def test_the_python_of_a_page_runs(name, elsewhere, few_iterations):
    pytest.importorskip("safetensors")
    page = ROOT / f"{name}.md"
    torch.manual_seed(0)
    names = of_the_reader() if name == "README" else {}
    if name == "README":
        importlib.import_module("qdrop")
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, str(page), "exec"), names)


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of hdrq in a block of a page, and where it stands."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash", ""):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    words = shlex.split(part, comments=True) if "hdrq" in part else []
                    if words[:3] == ["python", "-m", "hdrq"]:
                        words = words[2:]
                    if words and Path(words[0]).name == "hdrq":
                        found.append((page.name, words[1:]))
    return found


def test_every_command_line_parses():
    typer = pytest.importorskip("typer")
    from hdrq.benchmarks import __main__ as bench
    from hdrq.cli import app

    group = typer.main.get_command(app)
    lines = commands()
    for page, words in lines:
        name, *arguments = words
        assert name in group.commands, f"{page}: hdrq {' '.join(words)}"
        if name != "bench":
            group.commands[name].make_context(name, list(arguments)).close()
        elif arguments[:1] not in (["compat"], ["deploy"]):
            bench._parser("hdrq bench").parse_intermixed_args(arguments)
    assert len(lines) > 50 and {words[0] for _, words in lines} >= {"quantize", "merge", "bench", "parity", "demo"}


def test_options_named_in_sentences_exist():
    typer = pytest.importorskip("typer")
    from hdrq.cli import app

    group = typer.main.get_command(app)
    options = {
        name: {option for parameter in command.params for option in (*parameter.opts, "--help")}
        for name, command in group.commands.items()
    }
    wrong, seen = [], 0
    for page in PAGES:
        prose = BLOCK.sub("", text_of(page))
        for name, rest in re.findall(r"`hdrq ([a-z][\w-]*)([^`]*)`", prose):
            seen += 1
            named = re.findall(r"(?<!\S)--[\w-]+", rest) if name != "bench" else []
            if name not in options or not options[name] >= set(named):
                wrong.append(f"{page.name}: hdrq {name}{rest}")
    assert not wrong and seen > 30


def test_modules_that_are_run_exist():
    modules = {m for page in PAGES for m in re.findall(r"python -m (hdrq[\w.]*)", text_of(page))}
    assert modules and not [m for m in sorted(modules) if importlib.util.find_spec(m) is None]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    wrong, seen = [], 0
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", BLOCK.sub("", text_of(page))):
            if "://" in target:
                continue
            seen += 1
            file = page.parent / target if target else page
            if not file.exists() or (anchor and anchor[1:] not in anchors(file)):
                wrong.append(f"{page.name}: {target}{anchor}")
    assert not wrong and seen > 30


def test_nothing_is_cited_that_does_not_ship():
    """Texts that the project was made from lie outside of it."""
    wrong = []
    for folder in ("hdrq", "kernels", "csrc", "benchmarks", "tests", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".h", ".cpp") and path != Path(__file__):
                cited = re.findall(r"\b([A-Z]{4,}\.md)\b", path.read_text(encoding="utf-8"))
                wrong += [f"{path.relative_to(ROOT)}: {name}" for name in cited if name not in ROOTS]
    assert not wrong


class TestTheFormat:
    """docs/checkpoint.md, whose reader knows nothing of hdrq."""

    @pytest.fixture
    def reader(self, elsewhere):
        pytest.importorskip("safetensors")
        names: dict = {}
        for block in blocks(ROOT / "docs" / "checkpoint.md", "python"):  # the last one checks the vectors
            exec(compile(block, "checkpoint.md", "exec"), names)
        assert "hdrq" not in names and "torch" not in names
        return names

    def test_the_vectors_hold_what_was_written(self, reader):
        manifest, tensors = reader["read"](checkpoint_vectors.FILE)
        for layer, codes in checkpoint_vectors.CODES.items():
            assert reader["codes"](manifest, tensors, layer).tolist() == codes.tolist()

    def test_the_vectors_are_what_the_writer_writes(self, tmp_path):
        pytest.importorskip("safetensors")
        checkpoint_vectors.write(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == checkpoint_vectors.FILE.read_bytes()

    @pytest.mark.parametrize(
        "options",
        [
            {"bits": "W4A4"},
            {"bits": {"*": "W3A8"}, "per_channel": True},
            {"bits": {"*": "W8A8"}, "affine_weights": True, "per_channel": True},
            {"bits": {"3": "W4A8", "*": "float"}, "group_size": 16, "affine_weights": True},
            {"bits": {"*": "W12A12"}},
        ],
        ids=str,
    )
    def test_a_saved_model_is_read(self, reader, options, tmp_path):
        model = hdrq.quantize(network(1), torch.randn(16, 3, 8, 8), "rtn", progress=False, **options)
        hdrq.save(model, tmp_path / "model.safetensors")
        manifest, tensors = reader["read"](tmp_path / "model.safetensors")
        layers = quantized_layers(model)
        assert manifest["weights"].keys() == layers.keys()
        for name, layer in layers.items():
            codes = layer.weight_quantizer.codes(layer.latent)
            assert (reader["codes"](manifest, tensors, name) == codes.numpy()).all()
            weight = torch.from_numpy(reader["weight"](manifest, tensors, name))
            assert torch.equal(weight, model.get_submodule(name).weight)

    def test_an_altered_file_is_refused(self, reader, tmp_path):
        data = bytearray(checkpoint_vectors.FILE.read_bytes())
        data[-1] ^= 1
        (tmp_path / "altered.safetensors").write_bytes(data)
        with pytest.raises(AssertionError, match="altered"):
            reader["read"](tmp_path / "altered.safetensors")
