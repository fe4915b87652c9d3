"""Owns the start of the command line: by main.py, as ``python -m lit_qlora``, or as ``lit-qlora`` once installed."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until `main` handles it: no traceback of an import
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from lit_qlora.cli import main
from lit_qlora.console import take_names_as_utf8


def run() -> int:
    """Run the process's own command line; return its exit status."""
    take_names_as_utf8()
    return main()


if __name__ == "__main__":
    sys.exit(run())
