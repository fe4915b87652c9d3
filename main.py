"""The command line of lit-qlora. Any Python can read this file, and says so where it is too old for the others."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # for the Pythons that are too old, which pyproject.toml names
    found = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write(
        "error: this is Python " + found + ", and 3.11 or newer is needed: take another one, and with it "
        "pip install -r requirements.txt\n"
    )
    sys.exit(2)

from lit_qlora.__main__ import run

if __name__ == "__main__":
    sys.exit(run())
