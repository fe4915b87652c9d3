"""Owns the verbs: each module here is one, and what it is made of has a folder beside it.

A verb is a function of the module's name, whose signature is its options; this turns it into a command. Except `plan`
and `inspect`, which have fit's options, and `doctor`, which works without jsonargparse. Knows nothing of what a verb
does.
"""

import importlib
import textwrap
from collections.abc import Sequence


def run_tool(name: str, args: Sequence[str]) -> int:
    """Run a verb that is a plain function.

    Args:
        name: the verb; ``lit_qlora.tools.NAME.NAME`` is its function.
        args: its options, as on the command line.

    Returns:
        The exit status.
    """
    # Here, and not above: doctor works without jsonargparse.
    from jsonargparse import ArgumentParser

    from lit_qlora.console import WIDTH
    from lit_qlora.options import OneLineErrors
    from lit_qlora.place import PROGRAM
    from lit_qlora.signals import nothing_open

    class _ToolParser(OneLineErrors, ArgumentParser):
        """jsonargparse's parser, with errors in one line."""

    with nothing_open():
        function = getattr(importlib.import_module(f"lit_qlora.tools.{name}"), name)
    about = textwrap.fill(function.__doc__.splitlines()[0], WIDTH)
    parser = _ToolParser(allow_abbrev=False, prog=f"{PROGRAM} {name}", description=about)
    parser.add_function_arguments(function)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # --public alone means --public true
            action.nargs, action.const = "?", True
    try:
        options = parser.parse_args(list(args))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    function(**options.as_dict())
    return 0
