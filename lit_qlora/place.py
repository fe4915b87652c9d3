"""Owns where the project's own files lie, in a clone and as a package, and what its command is called there.

Imports nothing but Python's own. Knows no option and no verb.
"""

import re
from pathlib import Path

_PACKAGE = Path(__file__).parent

CLONE = None if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""The clone that this runs in; None where the package is installed, and its configs lie inside it (see setup.py)."""

CONFIGS = (CLONE or _PACKAGE) / "configs"
DEMO_CONFIG = CONFIGS / "demo.yaml"

COMMAND = "python main.py" if CLONE else "lit-qlora"
"""What the command is called: ``python main.py`` needs the clone's file."""

PROGRAM = COMMAND.removeprefix("python ")

INSTALL = "pip install -r requirements.txt" if CLONE else "install lit-qlora again with pip, which brings them"
"""The remedy where packages are missing."""


def find_config(name: str) -> str:
    """The file that ``--config NAME`` means: that of the path ``name``, else, for a bare name, the project's own."""
    own = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    return str(own) if Path(name).name == name and not Path(name).is_file() and own.is_file() else name


def requirements() -> list[str]:
    """The packages that are needed, each with its bounds."""
    if CLONE is None:
        from importlib import metadata  # here: --help needs none

        return [one for one in metadata.requires("lit-qlora") or [] if "extra ==" not in one]
    lines = (CLONE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if re.match(r"[\w-]", line)]
