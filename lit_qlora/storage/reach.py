"""Owns how ids on the hub are written, whether it can be reached, what is used where it can't: its cache, without
waiting for each file; and which files of it are here.

Knows no base and no rows.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""How an id on the hub is written."""
REACH_S = 5
"""How long the hub has to accept a connection. Its own library would try for 30 s, for each file again."""


def reaches_hub() -> bool:
    """True if the hub responds; unknown behind a proxy."""
    if any(name.lower() in ("https_proxy", "all_proxy") and value for name, value in os.environ.items()):
        return True
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("://")[-1].split("/")[0]
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port or 443)), timeout=REACH_S).close()
    except (OSError, ValueError):
        return False
    return True


def use_cache_if_silent() -> bool:
    """Use the hub's cache alone from here on, in this process, if the hub does not respond.

    Returns:
        True if that is new.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or reaches_hub():
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet, and for processes
    _set_offline(True)
    return True


def stored_file(location: str, name: str) -> Path | None:
    """A file that is here, in a folder or in the hub's cache; None if missing.

    Args:
        location: the folder, or a hub id.
        name: of the file.
    """
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(location, name)
    return Path(cached) if isinstance(cached, str) else None


@contextmanager
def offline() -> Iterator[None]:
    """A context in which the hub's cache is read, and nothing downloaded."""
    import datasets  # noqa: F401  # before the context: it keeps what it finds as it is imported
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    _set_offline(True)
    try:
        yield
    finally:
        _set_offline(before)


def _set_offline(value: bool) -> None:
    """Let the hub's libraries use its cache alone, or not: each keeps what the environment said at its import."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = value
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = value
