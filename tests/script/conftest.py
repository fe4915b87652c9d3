"""Owns where a script is tried: an empty folder, without the words that the command line silences, too."""

import pytest

from lit_qlora.quiet import quieten


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    quieten()
    monkeypatch.chdir(tmp_path)
    return tmp_path
