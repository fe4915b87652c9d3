"""The address of this project, put wherever it is named: badge, notebook, docs.

    python scripts/address.py https://github.com/ann/lit-qlora

It stands in pyproject.toml; each tracked text file that has it there is written with the new one. Without an argument,
it is printed.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def address(root: Path = ROOT) -> str:
    """The address as pyproject.toml has it."""
    found: str = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    return found


def move(new: str, root: Path = ROOT) -> list[str]:
    """Puts the address ``new``, https://github.com/OWNER/NAME, wherever the present one is named.

    Returns:
        The files that were changed.
    """
    old, site = address(root), "https://github.com/"
    new = new.removesuffix("/").removesuffix(".git")
    if not (new.startswith(site) and new.count("/") == 4 and new.isascii() and not {*new} & {*" \"'\\"}):
        raise SystemExit(f"error: expected https://github.com/OWNER/NAME, got {new}")
    changed = []
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a picture, weights
            continue
        moved = text.replace(old, new)
        # Colab's badge has it behind another host.
        moved = moved.replace(f"github/{old.removeprefix(site)}/", f"github/{new.removeprefix(site)}/")
        if moved != text:
            (root / name).write_bytes(moved.encode("utf-8"))
            changed.append(name)
    return changed


if __name__ == "__main__":
    print("\n".join(move(sys.argv[1]) if sys.argv[1:] else [address()]))
