"""Folders are whole or not there, whatever is cut off, flipped or forged."""

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from lit_qlora.errors import UserError
from lit_qlora.storage import folders
from lit_qlora.storage.files import SaveError
from lit_qlora.storage.folders import (
    DamagedFolderError,
    clear_leftovers,
    copy_folder,
    recover,
    remove_folder,
    verify_folder,
    write_folder,
)
from tests.expect import check_line

HELLO = hashlib.sha256(b"hello\n").hexdigest()


class Killed(BaseException):
    """Stands for a kill: nothing but a test may catch it."""


def fill(text: str):
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(text.encode() * 1000)

    return write


def hello(folder: Path) -> None:
    (folder / "a.txt").write_text("hello\n")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_folder(tmp_path / "x", fill("hello\n"))
    return tmp_path / "x"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def forge(folder: Path, files: object, version: object = 1) -> None:
    (folder / "manifest.json").write_text(json.dumps({"version": version, "files": files}))


# Writing


def test_manifest_is_literally_this(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "x", hello)
    assert json.loads((tmp_path / "deep" / "x" / "manifest.json").read_text()) == {
        "version": 1,
        "files": {
            "a.txt": {
                "bytes": 6,
                "sha256": "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
            }
        },
    }
    assert listing(tmp_path / "deep") == ["x"]
    verify_folder(tmp_path / "deep" / "x")


def test_files_in_subfolders_have_posix_names(whole: Path) -> None:
    assert list(json.loads((whole / "manifest.json").read_text())["files"]) == ["a.txt", "sub/b.bin"]


def test_a_copy_has_its_subfolders_and_makes_none_above_itself(whole: Path, tmp_path: Path) -> None:
    copy_folder(whole, tmp_path / "copy")
    assert verify_folder(tmp_path / "copy") == verify_folder(whole)
    with pytest.raises(SaveError, match="/gone/copy could not be saved: No such file or directory"):
        copy_folder(whole, tmp_path / "gone" / "copy")
    assert not (tmp_path / "gone").exists()


def test_private_files_become_readable(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        (folder / "a").touch(mode=0o600)
        (folder / "b").touch(mode=0o400)

    write_folder(tmp_path / "x", private)
    modes = [stat.S_IMODE((tmp_path / "x" / name).stat().st_mode) for name in ("a", "b", "manifest.json")]
    assert modes == [0o644, 0o644, 0o644]


def test_all_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    inodes = lambda: {path.stat().st_ino: path.name for path in [tmp_path, *tmp_path.rglob("*")]}  # noqa: E731

    def log_fsync(descriptor: int) -> None:
        events.append(inodes()[os.fstat(descriptor).st_ino].split("-")[0])
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    write_folder(tmp_path / "x", fill("new"))
    parent = tmp_path.name.split("-")[0]
    assert events == ["a.txt", "b.bin", "manifest.json", "sub", ".x.tmp", "rename", parent]


def test_what_stands_there_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_folder(whole, fill("new"))
    assert (whole / "a.txt").read_text() == "hello\n"
    (whole.parent / "file").touch()
    with pytest.raises(FileExistsError):
        write_folder(whole.parent / "file", fill("new"), replace=True)


def test_what_another_process_makes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def make_theirs(folder: Path) -> None:
        hello(folder)
        write_folder(tmp_path / "x", fill("theirs"))

    with pytest.raises(FileExistsError, match="not overwritten"):
        write_folder(tmp_path / "x", make_theirs)
    assert (tmp_path / "x" / "a.txt").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_replace(whole: Path) -> None:
    write_folder(whole, hello, replace=True)
    verify_folder(whole)
    assert listing(whole) == ["a.txt", "manifest.json"]
    assert listing(whole.parent) == ["x"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_fill_that_raises_leaves_nothing(tmp_path: Path, replace: bool, error: BaseException) -> None:
    def half(folder: Path) -> None:
        hello(folder)
        raise error

    if replace:
        write_folder(tmp_path / "x", fill("old"))
    with pytest.raises(type(error)):
        write_folder(tmp_path / "x", half, replace=replace)
    assert listing(tmp_path) == (["x"] if replace else [])
    if replace:
        verify_folder(tmp_path / "x")


@pytest.mark.parametrize("name", ["a\\b", "c:d", "new\nline"])
def test_names_that_other_systems_read_otherwise_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="portable names"):
        write_folder(tmp_path / "x", lambda folder: (folder / name).touch())
    assert listing(tmp_path) == []


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("kept\n")
    with pytest.raises(ValueError, match="plain files"):
        write_folder(tmp_path / "x", lambda folder: (folder / "a").symlink_to(tmp_path / "outside"))
    assert (tmp_path / "outside").read_text() == "kept\n"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain files"):
        write_folder(tmp_path / "x", lambda folder: os.mkfifo(folder / "pipe"))
    assert listing(tmp_path) == []


# Verifying


def test_a_flipped_bit(whole: Path) -> None:
    data = bytearray((whole / "sub" / "b.bin").read_bytes())
    data[3000] ^= 1
    (whole / "sub" / "b.bin").write_bytes(data)
    expected = hashlib.sha256(b"hello\n" * 1000).hexdigest()
    with pytest.raises(DamagedFolderError) as caught:
        verify_folder(whole)
    found = hashlib.sha256(data).hexdigest()
    check_line(
        str(caught.value), "'sub/b.bin'", f"expected sha256={expected}", f"found sha256={found}", begins=f"{whole}"
    )
    assert isinstance(caught.value, UserError)


def test_every_bit_of_a_small_file_counts(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", hello)
    for bit in range(48):
        data = bytearray(b"hello\n")
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x" / "a.txt").write_bytes(data)
        with pytest.raises(DamagedFolderError, match=f"expected sha256={HELLO}"):
            verify_folder(tmp_path / "x")


def test_a_truncated_file(whole: Path) -> None:
    os.truncate(whole / "a.txt", 4)
    with pytest.raises(DamagedFolderError) as caught:
        verify_folder(whole)
    assert caught.value.place == str(whole)
    assert all(words in str(caught.value) for words in ("'a.txt'", "bytes=6", "bytes=4"))


def test_a_zeroed_tail(whole: Path) -> None:
    os.truncate(whole / "sub" / "b.bin", 5000)
    os.truncate(whole / "sub" / "b.bin", 6000)
    with pytest.raises(DamagedFolderError, match=r"'sub/b.bin': expected sha256="):
        verify_folder(whole)


def test_what_is_missing_is_named(whole: Path) -> None:
    (whole / "a.txt").unlink()
    with pytest.raises(DamagedFolderError, match=r"x: 'a.txt': expected a file, .* no such file$"):
        verify_folder(whole)
    (whole / "manifest.json").unlink()
    with pytest.raises(DamagedFolderError, match=r"'manifest.json': expected a manifest .* no such file$"):
        verify_folder(whole)
    shutil.rmtree(whole)
    with pytest.raises(DamagedFolderError, match=r"x: expected a folder, found nothing$"):
        verify_folder(whole)
    whole.touch()
    with pytest.raises(DamagedFolderError, match=r"x: expected a folder, found a file$"):
        verify_folder(whole)


def test_a_file_in_the_place_of_a_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    remove_folder(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"version": 1}',
        b'{"version": 1, "files": []}',
        b'{"version": 1, "files": {"a.txt": null}}',
        b'{"version": 1, "files": {"a.txt": {}}}',
        b'{"version": 1, "files": {"a.txt": {"bytes": "6", "sha256": 1}}}',
        b'{"version": 2, "files": {}}',
        b'{"version": "1", "files": {}}',
        b'{"version": "\\n", "files": {}}',
    ],
)
def test_a_manifest_that_is_none(whole: Path, text: bytes) -> None:
    (whole / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedFolderError, match=r"x: 'manifest.json': expected .*, found .") as caught:
        verify_folder(whole)
    assert "\n" not in str(caught.value)


@pytest.fixture
def with_card(tmp_path: Path) -> Path:
    """A folder whose card was edited since."""
    write_folder(tmp_path / "x", lambda folder: [(folder / name).write_text("made") for name in ("README.md", "b.bin")])
    (tmp_path / "x" / "README.md").write_text("edited")
    return tmp_path / "x"


def test_a_card_may_be_edited_and_no_other_file(with_card: Path) -> None:
    assert verify_folder(with_card) == {"README.md": 6, "b.bin": 4}
    copy_folder(with_card, with_card.with_name("copy"))
    assert (with_card.with_name("copy") / "README.md").read_text() == "edited"
    (with_card / "README.md").unlink()
    with pytest.raises(DamagedFolderError, match=r"'README.md': expected a file, .* no such file"):
        verify_folder(with_card)


def test_recover_prefers_the_target_whose_card_was_edited_to_what_it_had_replaced(with_card: Path) -> None:
    write_folder(with_card.with_name(".x.old-1-0a0a0a0a"), hello)
    recover(with_card)
    assert (with_card / "README.md").read_text() == "edited"
    assert listing(with_card.parent) == ["x"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/etc/hostname",
            "..",
            "../secret",
            "sub/../../secret",
            "sub/../a.txt",
            "C:/x",
            "c:x",
            "\\\\host\\x",
        ),
        *("..\\secret", "sub\\b.bin", "", ".", "./a.txt", "sub//b.bin", "sub/", "a\0", "\ud800", "a\n"),
    ],
)
def test_a_path_in_the_manifest_that_leads_outside(whole: Path, name: str) -> None:
    (whole.parent / "secret").write_bytes(b"hello\n")
    forge(whole, {name: {"bytes": 6, "sha256": HELLO}})
    with pytest.raises(DamagedFolderError, match="expected a path inside ") as caught:
        verify_folder(whole)
    assert str(caught.value).isprintable()


def test_links_that_lead_outside(whole: Path) -> None:
    (whole / "a.txt").rename(whole.parent / "a.txt")
    (whole / "a.txt").symlink_to(whole.parent / "a.txt")
    with pytest.raises(DamagedFolderError, match=r"'a.txt': expected a path inside "):
        verify_folder(whole)
    (whole / "a.txt").unlink()
    (whole.parent / "a.txt").rename(whole / "a.txt")
    (whole / "sub").rename(whole.parent / "sub")
    (whole / "sub").symlink_to(whole.parent / "sub")
    with pytest.raises(DamagedFolderError, match=r"'sub/b.bin': expected a path inside "):
        verify_folder(whole)


def test_a_link_to_itself_and_a_name_too_long(whole: Path) -> None:
    (whole / "loop").symlink_to(whole / "loop")
    for name in ("loop", "a" * 300):
        forge(whole, {name: {"bytes": 6, "sha256": HELLO}})
        with pytest.raises(DamagedFolderError, match=f"'{name[:60]}.*: expected a readable file"):
            verify_folder(whole)


def test_a_folder_that_is_reached_through_a_link_is_fine(whole: Path) -> None:
    (whole.parent / "link").symlink_to(whole)
    verify_folder(whole.parent / "link")


def test_a_folder_in_place_of_a_file(whole: Path) -> None:
    (whole / "a.txt").unlink()
    (whole / "a.txt").mkdir()
    with pytest.raises(DamagedFolderError, match=r"'a.txt': expected a readable file, found .*directory"):
        verify_folder(whole)


def test_files_that_others_put_beside_are_allowed(whole: Path) -> None:
    (whole / "sub" / "desktop.ini").touch()
    assert verify_folder(whole) == {"a.txt": 6, "sub/b.bin": 6000}


# Cut off at every step


def cut(monkeypatch: pytest.MonkeyPatch, at: int, dead: bool, error: BaseException) -> list[str]:
    """Make the call number `at` that changes a folder fail, and, if dead, every later one."""
    calls: list[str] = []

    def patched(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == at or (dead and len(calls) > at):
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("rename", "replace", "fsync"):
        patched(os, name)
    patched(shutil, "rmtree")
    return calls


STEPS_OF_A_REPLACING_WRITE = 10  # fsync 5, rename 2, fsync 1, rmtree 1, and one past the end


@pytest.mark.parametrize("dead", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize("at", range(1, STEPS_OF_A_REPLACING_WRITE + 1))
def test_a_replacing_write_cut_off_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, dead: bool
) -> None:
    target = tmp_path / "adapter"
    write_folder(target, fill("old"))
    error = Killed() if dead else OSError(5, "Input/output error")
    with monkeypatch.context() as patch:
        calls = cut(patch, at, dead, error)
        try:
            write_folder(target, fill("new"), replace=True)
        except type(error):
            pass
        else:
            assert at == STEPS_OF_A_REPLACING_WRITE
    if not dead:
        verify_folder(target)  # a failure, other than a kill, needs no recovery

    recover(target)
    verify_folder(target)
    assert listing(tmp_path) == ["adapter"]
    put = "rename" in calls[: at - 1]  # the first rename makes way: from there on the new one is whole
    if dead:
        assert (target / "a.txt").read_text() == ("new" if put else "old")
    recover(target)
    verify_folder(target)


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("ready", ["new", "torn"])
def test_a_recovery_that_is_cut_off_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, ready: str
) -> None:
    target = tmp_path / "adapter"
    for text, name in (("old", ".adapter.old-1-00000000"), (ready, ".adapter.tmp-1-00000001")):
        write_folder(tmp_path / name, fill(text))
    if ready == "torn":
        os.truncate(tmp_path / ".adapter.tmp-1-00000001" / "a.txt", 1)
    write_folder(target, fill("rotten"))
    os.truncate(target / "a.txt", 1)
    with monkeypatch.context() as patch:
        cut(patch, at, True, Killed())
        with pytest.raises(Killed):
            recover(target)
    recover(target)
    verify_folder(target)
    assert (target / "a.txt").read_text() == ("new" if ready == "new" else "old")
    clear_leftovers(tmp_path)
    assert listing(tmp_path) == ["adapter"]


def test_recover_without_leftovers_touches_nothing(whole: Path) -> None:
    os.truncate(whole / "a.txt", 1)
    recover(whole)
    recover(whole.parent / "other")
    recover(whole.parent / "nowhere" / "other")
    assert listing(whole.parent) == ["x"]


def test_recover_keeps_what_a_user_added(whole: Path) -> None:
    (whole / "mine.txt").touch()
    write_folder(whole.parent / ".x.old-1-00000000", fill("old"))
    recover(whole)
    assert listing(whole) == ["a.txt", "manifest.json", "mine.txt", "sub"]


def test_recover_with_nothing_whole_keeps_finished_folders(tmp_path: Path) -> None:
    for name in ("x", ".x.old-1-00000000", ".x.tmp-1-00000000"):
        (tmp_path / name).mkdir()
    recover(tmp_path / "x")
    assert listing(tmp_path) == [".x.old-1-00000000", "x"]


def test_what_another_process_writes_is_no_leftover(tmp_path: Path) -> None:
    def overtaken(folder: Path) -> None:
        hello(folder)
        for _ in range(2):
            recover(tmp_path / "x")
            clear_leftovers(tmp_path)

    write_folder(tmp_path / "x", overtaken)
    assert (tmp_path / "x" / "a.txt").is_file()
    assert listing(tmp_path) == ["x"]


def test_a_leftover_that_another_process_removes_meanwhile(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole.parent / ".x.tmp-1-00000000").mkdir()
    stat = Path.stat

    def removed(path: Path, **options: bool) -> os.stat_result:
        if ".tmp-" in path.name:
            shutil.rmtree(path, ignore_errors=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", removed)
    recover(whole)
    assert listing(whole.parent) == ["x"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_folder_that_another_process_replaces_while_it_is_verified(
    whole: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    def replaced(path: Path) -> dict[str, dict[str, int | str]]:
        monkeypatch.undo()
        files = read_manifest(path)
        write_folder(whole, fill("longer than before\n"), replace=True)
        if is_damaged:
            (whole / "a.txt").write_text("short")
        return files

    read_manifest = folders._read_manifest
    monkeypatch.setattr(folders, "_read_manifest", replaced)
    if is_damaged:
        with pytest.raises(DamagedFolderError, match=r"a\.txt"):
            verify_folder(whole)
    else:
        assert verify_folder(whole)["a.txt"] == len("longer than before\n")


def test_recover_takes_the_newest(tmp_path: Path) -> None:
    for age, text in enumerate(("newest", "older", "oldest")):
        path = tmp_path / f".x.tmp-1-0000000{(age + 1) % 3}"
        write_folder(path, fill(text))
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    recover(tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() == "newest"
    assert listing(tmp_path) == ["x"]


def test_recover_minds_its_own_target_only(whole: Path) -> None:
    write_folder(whole.parent / ".xx.old-1-00000000", fill("of another"))
    shutil.rmtree(whole)
    recover(whole)
    assert listing(whole.parent) == [".xx.old-1-00000000"]


# Deleting and clearing


@pytest.mark.parametrize("at", [1, 2])
def test_a_deletion_cut_off_leaves_no_half_folder(whole: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    with monkeypatch.context() as patch:
        cut(patch, at, True, Killed())
        with pytest.raises(Killed):
            remove_folder(whole)
    if at == 1:
        verify_folder(whole)
    else:
        assert not whole.exists()
    clear_leftovers(whole.parent)
    assert listing(whole.parent) == (["x"] if at == 1 else [])


def test_remove_folder(whole: Path) -> None:
    remove_folder(whole)
    assert listing(whole.parent) == []
    with pytest.raises(FileNotFoundError):
        remove_folder(whole)


def test_clear_leftovers(whole: Path) -> None:
    kept = {".hidden", ".x.tmp", "x.tmp-1-00000000", ".x.tmp-1-mine"}
    for name in (*kept, ".x.tmp-1-00000000", ".y.tmp-22-abcdef01", ".z.gone-1-00000000"):
        (whole.parent / name).mkdir()
    clear_leftovers(whole.parent)
    assert set(listing(whole.parent)) == kept | {"x"}
    clear_leftovers(whole.parent / "nowhere")


def test_clear_leftovers_between_the_two_renames(tmp_path: Path) -> None:
    write_folder(tmp_path / ".x.old-1-00000000", fill("old"))
    write_folder(tmp_path / ".x.tmp-1-00000001", fill("new"))
    clear_leftovers(tmp_path)
    assert listing(tmp_path) == ["x"]
    assert (tmp_path / "x" / "a.txt").read_text() == "new"
