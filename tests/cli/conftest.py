"""A folder to call commands in."""

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a module, images of two classes, and states of two models."""
    from cli.quantizing import furnish

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    furnish(tmp_path)
    return tmp_path
