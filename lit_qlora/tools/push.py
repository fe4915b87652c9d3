"""Owns the verb push: an adapter or a merged model to the hub, private by default.

The files in a folder's manifest are verified and sent, and no others. The hub's side is in
`lit_qlora.tools.pushing.hub`. Knows no model.
"""

import re
import sys
from pathlib import Path

from lit_qlora.chosen import trained_run
from lit_qlora.errors import UserError
from lit_qlora.figures.card import addressed
from lit_qlora.quiet import quieten
from lit_qlora.storage.files import decoded, size
from lit_qlora.storage.folders import CARD, MANIFEST, DamagedFolderError, verify_folder
from lit_qlora.storage.run import RECORD
from lit_qlora.tools.pushing.hub import KIND_BY_FILE, Contents, Hub
from lit_qlora.wording import number_of

TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
"""A token of the hub. Narrower than what is hidden in messages: a name that looks like one must not end a push."""


def push(
    to: str,
    run: str | None = None,
    adapter: str | None = None,
    folder: str | None = None,
    public: bool = False,
    yes: bool = False,
) -> None:
    """Upload an adapter or a merged model to the hub: shows and asks first, private unless --public is given.

    Args:
        to: the repository, as NAME/REPO, created if missing. The account is that of HF_TOKEN in the environment, or of
            the stored login.
        run: run folder, for its best adapter; default: the run that was started last.
        adapter: an adapter folder instead of a run.
        folder: a folder that merge made, instead of both.
        public: make a new repository public, and allow one that is public already.
        yes: send without asking.
    """
    quieten()
    source = _folder_to_push(run, adapter, folder)
    kind, sizes = _verified(source)
    contents = _contents(source, sizes, to)
    hub = Hub(to, public)
    hub.check(kind)
    print(_plan(source, kind, contents, hub), flush=True)
    if yes or _agreed():
        print(hub.send(contents, f"The {kind}, from lit-qlora", lambda: _check_unchanged(source, sizes)))
    else:
        print("nothing was sent")


def _folder_to_push(run: str | None, adapter: str | None, folder: str | None) -> Path:
    given = [(name, value) for name, value in (("run", run), ("adapter", adapter), ("folder", folder)) if value]
    if len(given) > 1:
        (first, other), (second, value) = given[:2]
        raise UserError(f"{value} is given, and --{first} {other} too", option=second, remedy="give one of the two")
    return Path(adapter or folder or trained_run(run).adapter)


def _verified(source: Path) -> tuple[str, dict[str, int]]:
    """The kind of ``source``, and the sizes of its files by name. Raises UserError unless all are as saved."""
    kind, problem = next((kind for name, kind in KIND_BY_FILE.items() if (source / name).is_file()), None), None
    if not source.is_dir():
        problem = "is no folder"
    elif kind is None or not (source / RECORD).is_file():
        problem = "is no adapter and no merged model of lit-qlora"
    elif not (source / MANIFEST).is_file():
        problem = f"has no {MANIFEST}, so its files are unknown"
    if problem or kind is None:
        raise UserError(f"push: {source} {problem}", remedy="give a folder that fit or merge made")
    try:
        return kind, verify_folder(source)
    except DamagedFolderError as error:
        raise error.replace(
            problem=f"{error.problem}: it was altered or cut short after it was saved, and is not sent"
        ) from error


def _contents(source: Path, sizes: dict[str, int], to: str) -> Contents:
    """The files to send, by name: each unchanged but the card, which gets the name of the repository.

    The manifest is not sent: by it, a card edited on the hub would count as damaged, and the hub has its own hashes.
    Raises UserError if a text holds a token.
    """
    contents: Contents = {}
    for name in sorted(sizes):
        contents[name] = source / name
        if name.endswith(".safetensors"):
            continue
        content = (source / name).read_bytes()
        if TOKEN.search(content):
            raise UserError(f"push: {source / name} holds a token of the hub", remedy="take it out, nothing was sent")
        if name == CARD:
            text = decoded(content, place=source / name, remedy="save it as UTF-8, nothing was sent")
            contents[name] = addressed(text, to).encode()
    return contents


def _plan(source: Path, kind: str, contents: Contents, hub: Hub) -> str:
    sizes = {name: len(part) if isinstance(part, bytes) else part.stat().st_size for name, part in contents.items()}
    width = max(map(len, sizes))
    lines = [f"push  {kind} {source}", f"to    {hub.to}: {hub.effect(contents)}; as {hub.account}"]
    lines += [f"        {name:{width}} {size(count):>9}" for name, count in sizes.items()]
    return "\n".join([*lines, f"      {number_of(len(sizes), 'files')}, {size(sum(sizes.values()))}"])


def _agreed() -> bool:
    if not sys.stdin.isatty():
        what = "nothing was sent, for here is no terminal to ask at"
        raise UserError(what, option="yes", remedy="give --yes to send what is shown")
    try:
        return input("send it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _check_unchanged(source: Path, sizes: dict[str, int]) -> None:
    """Raises UserError if a running training has replaced the adapter while it was sent."""
    try:
        if verify_folder(source) == sizes:
            return
    except DamagedFolderError:
        pass
    raise UserError(
        f"push: {source} was changed while it was sent, and the hub has none of it", remedy="give the command again"
    )
