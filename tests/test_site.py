"""The documentation's site builds without a warning, its links lead somewhere, and what it generates is all there."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from hdrq.recipes import NAMES, Recipe

for package in ("mkdocs", "material", "mkdocstrings", "safetensors", "typer"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="not run from a source tree")


class Page(HTMLParser):
    """The anchors and links of a page, and its text outside of code."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.text, self._code = set(), [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self._code += tag in ("code", "pre", "script", "style")
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]

    def handle_endtag(self, tag):
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self._code:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return {path.relative_to(folder): Page(path) for path in folder.rglob("*.html")}, folder


def test_links_lead_to_pages_files_and_anchors(site):
    pages, folder = site
    wrong = []
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else []:  # its links are those of the root
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (folder / path.parent / unquote(parts.path)).resolve() if parts.path else folder / path
            target = target / "index.html" if target.is_dir() else target
            there = pages.get(target.relative_to(folder))
            anchor = unquote(parts.fragment)
            if not target.exists() or (there and anchor and anchor not in there.anchors):
                wrong.append(f"{path}: {link}")
    assert not wrong and len(pages) > 30


def test_no_markup_is_left_in_the_text(site):
    left = [
        f"{path}: {text.strip()[:80]}"
        for path, page in site[0].items()
        for text in page.text
        if any(mark in text for mark in ("```", "**", "](", "|---", "::", "`"))
    ]
    assert not left


def test_generated_tables_are_whole(site):
    from typer.main import get_command

    from hdrq.cli import app

    folder = site[1]
    recipes = (folder / "recipes" / "index.html").read_text(encoding="utf-8")
    for knob in Recipe.__dataclass_fields__:
        assert knob == "name" or recipes.count(f"<code>{knob}</code>") >= len(NAMES), knob
    commands = Page(folder / "commands" / "index.html").anchors
    assert commands >= {f"hdrq-{name}" for name in get_command(app).commands}
    ops = Page(folder / "api" / "ops" / "index.html").anchors
    assert ops >= {"hdrq.ops.merge", "hdrq.ops.fake_quantize", "hdrq.ops.noise_quantize"}
