"""Owns the verbs: each module here is one, and what it is made of has a folder beside it.

A verb is a function of the module's name, whose signature is its options; this turns it into a command. Except `plan`
and `inspect`, which have fit's options, and `doctor`, which works without jsonargparse. Knows nothing of what a verb
does.
"""

import importlib
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
    from lit_qlora.options import Parser, check_once, type_of, typed_actions
    from lit_qlora.place import COMMAND
    from lit_qlora.signals import nothing_open
    from lit_qlora.usage import EXAMPLES, help_asked, help_of_tool

    with nothing_open():
        function = getattr(importlib.import_module(f"lit_qlora.tools.{name}"), name)
    parser = Parser(add_help=False, usage=f"{COMMAND} {name}{EXAMPLES[name][0][0]}")
    parser.add_function_arguments(function)
    actions = typed_actions(parser)
    if help_asked(args):
        print(help_of_tool(name, function.__doc__.splitlines()[0], actions), end="")
        return 0
    for action in actions:
        if type_of(action) is bool:  # --public alone means --public true
            action.nargs, action.const = "?", True
    check_once(args, parser.types())
    function(**parser.parse_args(list(args)).as_dict())
    return 0
