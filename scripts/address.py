"""The address of this project, put wherever it is named: badge, notebook, docs.

    python scripts/address.py https://github.com/ann/lit-qlora

It stands in pyproject.toml; each tracked text file that has it there is written with the new one. Without an argument,
it is printed.
"""

import argparse
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = "https://github.com/"


def address(root: Path = ROOT) -> str:
    """The address that pyproject.toml in ``root`` has."""
    found: str = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    return found


def checked(new: str) -> str:
    """Return the address ``new``, https://github.com/OWNER/NAME, without a slash or .git at its end.

    Raises:
        argparse.ArgumentTypeError: It is no such address.
    """
    new = new.removesuffix("/").removesuffix(".git")
    if not (new.startswith(SITE) and new.count("/") == 4 and new.isascii() and not {*new} & {*" \"'\\"}):
        raise argparse.ArgumentTypeError(f"expected {SITE}OWNER/NAME, got {new}")
    return new


def move(new: str, root: Path = ROOT) -> list[str]:
    """Put a new address wherever the present one is named.

    Args:
        new: The address, as `checked` returns it.
        root: Checkout whose tracked files are changed.

    Returns:
        The files that were changed.
    """
    old, changed = address(root), list[str]()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a picture, weights
            continue
        moved = text.replace(old, new)
        # Colab's badge has it after another host.
        moved = moved.replace(f"github/{old.removeprefix(SITE)}/", f"github/{new.removeprefix(SITE)}/")
        if moved != text:
            (root / name).write_bytes(moved.encode("utf-8"))
            changed.append(name)
    return changed


def main() -> None:
    """Print the address, or put another one everywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=checked, nargs="?", metavar="NEW", help="the address to put everywhere")
    new = parser.parse_args().new
    print("\n".join(move(new) if new else [address()]))


if __name__ == "__main__":
    main()
