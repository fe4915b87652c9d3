"""Folders that several processes share: what is in use stays, what was used longest ago goes first."""

import os
import shutil
import time
from pathlib import Path

import pytest

from lit_qlora.storage import in_use
from lit_qlora.storage.folders import write_folder
from lit_qlora.storage.in_use import Held, prune, remove_unused, write_once


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


def write(folder: Path, text: str) -> None:
    (folder / "file").write_text(text)


def test_a_folder_is_written_once(tmp_path: Path) -> None:
    assert write_once(tmp_path / "x", lambda folder: write(folder, "first"))
    assert not write_once(tmp_path / "x", lambda folder: write(folder, "second"))
    assert (tmp_path / "x" / "file").read_text() == "first"


@pytest.mark.parametrize("is_removed", [False, True])
def test_another_process_may_write_it_meanwhile_and_a_third_remove_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    target, rmtree = tmp_path / "x", shutil.rmtree

    def fill(folder: Path) -> None:
        write_folder(target, lambda theirs: write(theirs, "theirs"))
        write(folder, "ours")

    def remove_both(path: Path, **options: bool) -> None:
        rmtree(path, **options)
        if is_removed and ".tmp-" in path.name:
            rmtree(target)

    monkeypatch.setattr(shutil, "rmtree", remove_both)
    assert not write_once(target, fill)
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_removed else ["x"])


def test_a_file_or_a_broken_link_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            write_once(tmp_path / name, lambda folder: write(folder, "new"))


def test_a_use_is_noted_and_keeps_a_folder_until_it_is_closed(folders: list[Path]) -> None:
    held = Held(folders[2])
    assert time.time() - (folders[2] / "manifest.json").stat().st_mtime < 60
    assert not remove_unused(folders[2])
    held.close()
    assert remove_unused(folders[2])
    assert not folders[2].exists()


def test_a_missing_folder_is_held_by_nobody_and_is_gone(tmp_path: Path) -> None:
    held = Held(tmp_path / "x")
    assert not held.found
    held.close()
    assert remove_unused(tmp_path / "x")


@pytest.mark.parametrize("anew", [True, False])
def test_what_was_removed_while_waiting_is_held_only_if_made_anew(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    flock, waited = in_use.flock, []

    def late(descriptor: int, **how: bool) -> bool:
        if not waited:
            folders[0].rename(tmp_path / "gone")
            if anew:
                write_folder(folders[0], lambda within: (within / "file").write_bytes(bytes(7)) and None)
        waited.append(descriptor)
        return flock(descriptor, **how)

    monkeypatch.setattr(in_use, "flock", late)
    held = Held(folders[0])
    assert (held.found, len(waited)) == (anew, 1 + anew)
    monkeypatch.undo()
    assert remove_unused(folders[0]) is not anew
    held.close()
    assert remove_unused(folders[0])


def test_a_damaged_folder_goes_although_others_use_it_but_not_one_made_anew(folders: list[Path]) -> None:
    first, second = Held(folders[0]), Held(folders[0])
    first.discard()
    assert not folders[0].exists()
    write_folder(folders[0], lambda within: (within / "file").write_bytes(bytes(7)) and None)
    second.discard()
    assert folders[0].is_dir()
    Held(folders[0]).discard()
    assert not folders[0].exists()
    Held(folders[0]).discard()


def test_a_folder_without_a_manifest_and_a_file_in_its_place_are_discarded(folders: list[Path]) -> None:
    (folders[0] / "manifest.json").unlink()
    folders[1].rename(folders[1].with_name("moved"))
    folders[1].touch()
    for folder, found in zip(folders[:2], [False, True], strict=True):
        held = Held(folder)
        assert held.found is found
        held.discard()
        assert not folder.exists()


def test_one_made_after_it_was_found_missing_is_not_discarded(folders: list[Path]) -> None:
    held = Held(folders[0].with_name("x"))
    folders[0].rename(folders[0].with_name("x"))
    held.discard()
    assert folders[0].with_name("x").is_dir()


def test_what_can_not_be_opened_is_there_and_a_removal_that_fails_is_an_error(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(in_use.os, "open", denied)
    held = Held(folders[0])
    assert held.found
    monkeypatch.setattr(in_use, "remove_folder", denied)
    with pytest.raises(PermissionError):
        held.discard()
    monkeypatch.undo()
    held.discard()
    assert not folders[0].exists()


def test_a_folder_that_is_another_at_each_look_is_held(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_use, "is_still", lambda *_: False)
    held = Held(folders[0])
    monkeypatch.undo()
    assert held.found
    assert not remove_unused(folders[0])
    held.close()


def test_a_folder_without_its_manifest_can_not_be_in_use(folders: list[Path]) -> None:
    held = Held(folders[0])
    (folders[0] / "manifest.json").unlink()
    assert remove_unused(folders[0])
    held.close()


def test_one_that_was_made_anew_meanwhile_stays(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    flock = in_use.flock

    def late(descriptor: int) -> bool:
        (folders[0] / "manifest.json").rename(folders[0] / "before")
        (folders[0] / "manifest.json").touch()
        return flock(descriptor)

    monkeypatch.setattr(in_use, "flock", late)
    assert not remove_unused(folders[0])


def test_those_used_longest_ago_go_down_to_a_number_or_bytes(folders: list[Path]) -> None:
    assert names(prune(folders, most=3, most_bytes=10_000)) == []
    removed = prune(folders, most=2)
    assert names(removed) == ["oldest"]
    assert 1000 < removed[folders[2]] < 1400
    assert names(prune(folders, most_bytes=1400)) == ["old"]
    assert names(prune(folders, most=0, unused_s=2 * 3600)) == []
    assert folders[0].is_dir()
