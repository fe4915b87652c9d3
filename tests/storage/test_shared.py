"""Folders that several processes share: what is in use stays, what was used longest ago goes first."""

import os
import time
from pathlib import Path

import pytest

from lit_qlora.storage import shared
from lit_qlora.storage.folders import write_folder
from lit_qlora.storage.shared import Held, prune, remove_unused


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three of a thousand bytes and a manifest each, used one, two and three hours ago."""
    found = [tmp_path / name for name in ("new", "old", "oldest")]
    for hours, folder in enumerate(found, start=1):
        write_folder(folder, lambda within: (within / "file").write_bytes(bytes(1000)) and None)
        os.utime(folder / "manifest.json", (time.time() - 3600 * hours,) * 2)
    return found


def names(removed: dict[Path, int]) -> list[str]:
    return [folder.name for folder in removed]


def test_a_use_is_noted_and_keeps_a_folder_until_it_is_closed(folders: list[Path]) -> None:
    held = Held(folders[2])
    assert time.time() - (folders[2] / "manifest.json").stat().st_mtime < 60
    assert not remove_unused(folders[2])
    held.close()
    assert remove_unused(folders[2])
    assert not folders[2].exists()


def test_a_missing_folder_is_held_by_nobody_and_is_gone(tmp_path: Path) -> None:
    Held(tmp_path / "x").close()
    assert remove_unused(tmp_path / "x")


def test_a_folder_without_its_manifest_can_not_be_in_use(folders: list[Path]) -> None:
    held = Held(folders[0])
    (folders[0] / "manifest.json").unlink()
    assert remove_unused(folders[0])
    held.close()


def test_one_that_was_made_anew_meanwhile_stays(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    flock = shared.flock

    def late(descriptor: int) -> bool:
        (folders[0] / "manifest.json").rename(folders[0] / "before")
        (folders[0] / "manifest.json").touch()
        return flock(descriptor)

    monkeypatch.setattr(shared, "flock", late)
    assert not remove_unused(folders[0])


def test_those_used_longest_ago_go_down_to_a_number_or_bytes(folders: list[Path]) -> None:
    assert names(prune(folders, most=3, most_bytes=10_000)) == []
    removed = prune(folders, most=2)
    assert names(removed) == ["oldest"]
    assert 1000 < removed[folders[2]] < 1400
    assert names(prune(folders, most_bytes=1400)) == ["old"]
    assert names(prune(folders, most=0, unused_s=2 * 3600)) == []
    assert folders[0].is_dir()
