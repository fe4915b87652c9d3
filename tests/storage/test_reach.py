"""A hub that does not respond is not waited for, and its cache is used."""

import os
import socket
import time

import datasets
import pytest
from huggingface_hub import constants

from lit_qlora.demo import BASE
from lit_qlora.errors import UserError
from lit_qlora.model.base import find_base
from lit_qlora.storage.reach import offline, reaches_hub, use_cache_if_silent
from tests.expect import check_line


def test_the_hub_is_not_waited_for(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert reaches_hub()
    assert not reaches_hub()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert reaches_hub()


@pytest.fixture
def silent(monkeypatch):
    """A hub at a port where nobody listens."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_a_base_that_is_not_cached_is_refused_at_once(silent):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"not in the cache, .* hub can't be reached"):
        find_base("owner/unknown", weights=False)
    assert time.monotonic() - began < 20  # the hub's own library takes 30
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_that_is_found_once(silent):
    assert [use_cache_if_silent(), use_cache_if_silent()] == [True, False]


def test_a_cached_base_is_used_with_a_word(silent, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    file = folder / "snapshots" / ("a" * 40) / "config.json"
    file.parent.mkdir(parents=True)
    file.write_bytes((BASE / "config.json").read_bytes())
    assert find_base("owner/tiny", weights=False).name == "owner/tiny"
    check_line(capsys.readouterr().err, "can't be reached", "cache", "owner/tiny", begins="note: the hub ")


def test_a_context_without_the_hub_ends_as_it_began(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), offline():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
