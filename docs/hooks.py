"""What the site has beside the files of docs/: pages of the repository's own, API pages, tables that the code makes.

mkdocs calls the functions by their names (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages that lie elsewhere in the repository, where GitHub shows them too.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/results/README.md": "results/index.md",
    "benchmarks/results/reproduce/digits-tables.md": "results/digits-tables.md",
    "benchmarks/results/reproduce/digits-post-merge.md": "results/digits-post-merge.md",
    "benchmarks/results/reproduce/digits-vit-tables.md": "results/digits-vit-tables.md",
    "benchmarks/results/reproduce/digits-sam-gains.md": "results/digits-sam-gains.md",
    "benchmarks/results/reproduce/digits-vit-post-merge.md": "results/digits-vit-post-merge.md",
    "benchmarks/results/reproduce/digits-left-out.md": "results/digits-left-out.md",
}
PUBLIC = ("hdrq", "ops", "evaluate", "compat", "export", "qat", "parity")  # packages whose __all__ is their page
NAMED = {  # of others, the objects that a user meets
    "recipes": ("Recipe", "recipe"),
    "quantizers": (
        "layers.quantized_layers",
        "layers.register_layer",
        "modules.WeightQuantizer",
        "modules.ActivationQuantizer",
    ),
    "merging": ("merge_files", "readiness", "add_file"),
    "report": ("report_of", "RunReport", "BlockReport"),
}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
SOURCES = {site: source for source, site in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, site in PAGES.items():
        files.append(File.generated(config, site, content=(ROOT / source).read_text(encoding="utf-8")))
    for name in PUBLIC:
        files.append(File.generated(config, f"api/{name}.md", content=_api(name)))
    for name, objects in NAMED.items():
        blocks = "\n".join(f"::: hdrq.{name}.{each}\n" for each in objects)
        files.append(File.generated(config, f"api/{name}.md", content=f"# hdrq.{name}\n\n{blocks}"))
    return files


def _api(name: str) -> str:
    module = "hdrq" if name == "hdrq" else f"hdrq.{name}"
    bare = "show_root_heading: false, show_root_toc_entry: false"
    page = f"# {module}\n\n::: {module}\n    options: {{{bare}}}\n"
    if name == "compat":
        page += (
            f"\n## hdrq.compat.functional\n\n::: hdrq.compat.functional\n    options: {{{bare}, heading_level: 3}}\n"
        )
    return page


def on_page_markdown(markdown: str, page: Page, **kwargs) -> str:
    site = page.file.src_uri
    place = posixpath.dirname(SOURCES.get(site, f"docs/{site}"))

    def rewritten(match: re.Match) -> str:
        before, target, anchor, after = match.groups()
        if "://" in target or not site.endswith(".md"):
            return match[0]
        source = posixpath.normpath(posixpath.join(place, target))
        wanted = PAGES.get(source, source.removeprefix("docs/") if source.startswith("docs/") else None)
        if wanted is None:
            return match[0]
        return before + posixpath.relpath(wanted, posixpath.dirname(site) or ".") + (anchor or "") + after

    markdown = LINK.sub(rewritten, _indented(markdown))
    if site == "index.md":
        page.meta["hide"] = ["navigation"]  # the tabs above have it all
    if site == "recipes.md":
        markdown = re.sub(r"<!-- recipes:.*?-->", lambda _: "\n".join(_recipes()), markdown, flags=re.DOTALL)
    if site == "commands.md":
        markdown = re.sub(r"<!-- commands:.*?-->", lambda _: "\n".join(_commands()), markdown, flags=re.DOTALL)
    return markdown


def _indented(markdown: str) -> str:
    """What belongs to an item of a list, four spaces in, as Python-Markdown wants it; GitHub is content with two."""
    lines, inside = [], None  # inside: how far the lines of a fenced block move
    for line in markdown.split("\n"):
        margin = len(line) - len(line.lstrip(" "))
        moved = inside if inside is not None else 4 - margin if margin in (2, 3) else 0
        if line.lstrip().startswith("```"):
            inside = moved if inside is None else None
        lines.append(" " * moved + line if line.strip() else line)
    return "\n".join(lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _recipes() -> Iterator[str]:
    """What ``hdrq recipes`` prints, for every recipe."""
    from typer.testing import CliRunner

    from hdrq.cli import app

    def printed(*arguments: str):
        return json.loads(CliRunner().invoke(app, ["recipes", *arguments, "--json"]).output)

    for name, source in printed().items():
        yield from (f"## {name}", "", f"{source}.", "", "| knob | paper | official | |", "|---|---|---|---|")
        for row in printed(name):
            other = "" if row["official"] == row["paper"] else f"`{row['official']}`"
            yield f"| `{row['knob']}` | `{_cell(row['paper'])}` | {_cell(other)} | {_cell(row['text'])} |"
        yield ""


def _commands() -> Iterator[str]:
    """The arguments and options of every command."""
    import typer
    from typer.testing import CliRunner

    from hdrq.cli import app

    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield from (f"## hdrq {name}", "", command.help or "", "")
        if name == "bench":
            printed = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100"}).output
            yield from ("```text", printed.rstrip(), "```", "")
            continue
        if command.params:
            yield from ("| | |", "|---|---|")
        for parameter in command.params:
            names = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
            default = parameter.default
            given = "" if default in (None, False, (), "") or callable(default) else f" Default: `{default}`."
            yield f"| {names} | {_cell(getattr(parameter, 'help', None) or '')}{given} |"
        yield ""
