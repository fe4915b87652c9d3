"""The command line of lit-qlora."""

import sys

from lit_qlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
