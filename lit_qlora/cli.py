"""Owns the dispatch to verbs, what is prepared before any of them, and how user errors end: one line, status 2.

Imports nothing heavy, so that help is immediate. Knows which module runs a verb, its line of help, and whether the same
command resumes it.
"""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lit_qlora import __version__
from lit_qlora.console import complain, prepare, say_imports
from lit_qlora.devices import starting
from lit_qlora.devices.mistakes import report_once
from lit_qlora.devices.world import world
from lit_qlora.errors import SecretError, UserError, cut, excerpt, likely_meant, nearest
from lit_qlora.place import CLONE, COMMAND, INSTALL
from lit_qlora.secrecy import holds_secret, redact
from lit_qlora.signals import leave_in_one_line, nothing_open
from lit_qlora.storage.files import SaveError
from lit_qlora.text.conversation import HALF, is_encodable

TRAINERS = ("fit", "validate", "test")
"""The verbs that several processes can run together."""
FIT_AND_KIN = {
    **dict.fromkeys(TRAINERS, "lit_qlora.training"),
    **{verb: f"lit_qlora.tools.{verb}" for verb in ("plan", "inspect")},
}
"""The modules of fit and of the verbs that take its options."""

TOOLS = ("chat", "predict", "merge", "export", "evaluate", "push", "report")

HELP = """\
lit-qlora: fine-tune Llama 2 and its kin in 4-bit with LoRA

  python main.py fit                    the demo, in half a minute on a laptop
  python main.py fit --config colab_t4  Llama 2 7B on a free Colab T4
  python main.py chat                   talk with what was trained

before    doctor    what is wrong here, and what to do about it
          inspect   what a fit would learn, row by row
          plan      the memory, time and disk of a fit; needs no GPU
train     fit       train, or resume: the same command, given again
          validate  score a run's best adapter on its held-out rows
          test      the same on test rows
          evaluate  base against adapter, with intervals; MMLU's questions, too
          report    a run on one page, which is also written at its end
use       chat      at the terminal; --prompt TEXT once; --web in a browser
          predict   answer a file of prompts
          merge     merge an adapter into its base: a plain model folder
          export    the same as one file, for llama.cpp and Ollama
          push      upload an adapter or a merged model to the hub

Every verb has --help; --version says which this is.
Curves and sample answers: tensorboard --logdir runs
"""


def prepare_memory() -> None:
    """Let torch's allocator on a GPU grow its segments, unless the environment sets it otherwise.

    Batches of many lengths leave gaps between segments of fixed size. Set before torch is imported.
    """
    asked = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & {*os.environ}
    if not asked and sys.platform == "linux":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, and print what a user can mend in one line.

    Args:
        args: from the verb on; default: the process's own.

    Returns:
        The exit status: 2 for an error of the user's, 1 for a save that failed.
    """
    is_own, args = args is None, list(sys.argv[1:] if args is None else args)
    prepare(answers=args[:1] == ["chat"])
    prepare_memory()
    try:
        with leave_in_one_line(resumes=args[:1] in (["fit"], ["predict"], ["push"]), ends_process=is_own):
            return _run(args)
    except UserError as error:
        report_once(error)
        return 2
    except SaveError as error:
        report_once(redact(str(error)))
        return 1
    except UnicodeEncodeError as error:  # of a name: what is printed is prepared, and files are UTF-8
        report_once(f"{error.object!a} can't be a name here ({error.encoding}): set LC_ALL=C.UTF-8")
        return 2
    except Exception as error:
        if problem := _of_a_path(error):
            report_once(problem)
            return 2
        from lit_qlora.tools.doctoring.surroundings import missing

        names = missing(error)
        if not names:
            raise
        what = f"not installed for {sys.executable}: {', '.join(names)}"
        activate = CLONE / ".venv" / "bin" / "activate" if CLONE else None
        is_elsewhere = activate and activate.is_file() and Path(sys.prefix).resolve() != activate.parents[1].resolve()
        report_once(f"{what}; {f'. {activate}, or ' if is_elsewhere else ''}{INSTALL}, or take the Python that has it")
        return 2


_FORBIDDEN = "this user may not read it, or write there; change its permissions, or give another path"
_GONE = "its disk or drive does not answer; mount it again"
UNREACHABLE = {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EIO: _GONE,
    errno.ENOTCONN: _GONE,  # such as Colab's Google Drive, once it is cut off
    errno.ESTALE: _GONE,
}
"""Problem and remedy of a path that the system can't follow, by errno."""


def _of_a_path(error: BaseException | None) -> str | None:
    """The error for a path that the system can't follow, whichever option gave it; None for any other ``error``."""
    if isinstance(error, RuntimeError) and getattr(error.__context__, "errno", None) == errno.ELOOP:
        return _of_a_path(error.__context__)  # pathlib's own for a loop, up to Python 3.12
    number, file = getattr(error, "errno", None), getattr(error, "filename", None)
    if number == errno.ENAMETOOLONG:
        return f"{str(file)[:60]}…: no path may be so long here"
    if number == errno.ELOOP:
        return f"{file}: a link that leads to itself; give the file or folder itself"
    if file is not None and number in UNREACHABLE:
        return f"{file}: {UNREACHABLE[number]}"
    if number == errno.ENOENT:
        try:
            Path.cwd()
        except FileNotFoundError:
            return "the folder that this was started in is not there any more: cd into it again, or into another one"
    return None


def check_texts(args: Sequence[str], are_kept: bool = True) -> None:
    """Check that no option of a command line, ``--name value`` or ``--name=value``, holds what none may.

    Args:
        args: the command line.
        are_kept: True if its options may be written to files.

    Raises:
        UserError: one holds bytes that are no UTF-8, or, if they are kept, a secret.
    """
    name = "the command"
    for arg in args:
        option, _, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        name = option.removeprefix("--") or name
        if not is_encodable(arg):
            raise UserError(f"it {HALF}, got {cut(ascii(arg))}", option=name, remedy="convert it")
        if are_kept and holds_secret(name, value):
            raise SecretError(name)


def _run(args: list[str]) -> int:
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help", "help"):
        print(HELP.replace("python main.py", COMMAND), end="")
        return 0
    if verb == "--version":
        print(f"lit-qlora {__version__}")
        return 0
    check_texts(args, are_kept=verb != "chat")  # conversations of a chat are not saved
    if verb != "doctor":  # which reports it
        for left in starting.take_place(is_for_several=verb in TRAINERS):
            complain(f"note: {left}")
    if verb in FIT_AND_KIN:
        return _run_fit_or_kin(verb, args)
    if verb == "doctor":
        with nothing_open():
            from lit_qlora.tools import doctor

        return doctor.main(args[1:])
    if verb in TOOLS:
        from lit_qlora.tools import run_tool

        return run_tool(verb, args[1:])
    verbs = [*FIT_AND_KIN, *TOOLS, "doctor"]
    if verb.startswith("-"):
        problem = f"{excerpt(verb)} stands where a verb is expected"
        raise UserError(problem, remedy=f"begin with one: {', '.join(verbs)}, as in {COMMAND} fit {verb} …")
    with nothing_open():
        from lit_qlora.elsewhere import answers
    known = answers("verbs").get(verb.lower().replace("-", "_"))
    near = None if known else nearest(verb, verbs, 0.6)
    meant = f"here it is {known}; " if known else f"{likely_meant(near)} " if near else ""
    raise UserError(f"no verb {excerpt(verb)}", remedy=f"{meant}there are {', '.join(verbs)} (see --help)")


def _run_fit_or_kin(verb: str, args: list[str]) -> int:
    """Run fit or its kin: help and the first checks come before imports of seconds, as does a line about these."""
    with nothing_open():
        from lit_qlora.command import complete
        from lit_qlora.precheck import check_first
        from lit_qlora.usage import help_asked, help_of, help_of_class

    of_class, asked = help_of_class(args[1:]), help_asked(args[1:])
    if of_class:
        print(of_class, end="")
        return 0
    if asked:
        print(help_of(verb, asked), end="")
        return 0
    command = complete(args)
    count = check_first(command)
    try:
        if count > 1 and verb in TRAINERS and world().size == 1:
            raise starting.SeveralAsked(count)
        if world().rank == 0:
            prints_config = any(arg.startswith("--print_config") for arg in args)  # which goes into a file
            say_imports(sys.stderr if prints_config else None)
        with nothing_open():
            module = import_module(FIT_AND_KIN[verb])
        return int(module.main(command))
    except starting.SeveralAsked as several:  # each of them comes here again
        return starting.run_several(args, several.args[0])
    except SystemExit as stop:  # a signal
        return int(stop.code or 0)
