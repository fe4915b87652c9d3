"""Owns the verb doctor: what is found, what would be chosen, what to do about it, and the text for an issue.

Takes its two options without jsonargparse, for that may be what is missing. What is found is `surroundings`'s.
"""

import argparse
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lit_qlora.errors import UserError
from lit_qlora.quiet import quieten
from lit_qlora.tools import surroundings
from lit_qlora.tools.surroundings import Finding

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "colab_t4.yaml"
INSTALL = "pip install -r requirements.txt"
DESCRIPTION = """Say what is wrong here, what to do about it, and what a fit would choose.

Status 0 when nothing would stop a fit (a note does not), else 2. Changes nothing.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; the accepted options are listed by --help")


def main(args: list[str]) -> int:
    """Prints the findings for ``args``, the options; returns the exit status: 2 where something would stop a fit."""
    parser = _Parser("main.py doctor", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--base", metavar="ID|DIR", help="base to look for; default: that of configs/colab_t4.yaml")
    parser.add_argument("--run", metavar="DIR", default="runs", help="where runs are written; default: runs")
    try:
        options = parser.parse_args(args)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    findings = []
    for finding in look(options.base, Path(options.run).expanduser()):
        print(f"{finding.kind:>7}  {finding.text}", flush=True)  # as they come: importing takes some seconds
        if finding.remedy:
            print(f"{'->':>7}  {finding.remedy}", flush=True)
        findings.append(finding)
    problems = sum(finding.kind == "problem" for finding in findings)
    notes = sum(finding.kind == "note" for finding in findings)
    print(f"\nproblems: {problems}, notes: {notes}. To paste into an issue:\n\n```")
    print("\n".join(without_private_parts(f"{finding.kind:>7}  {finding.text}") for finding in findings))
    print("```")
    return 2 if problems else 0


def look(base: str | None, run: Path) -> Iterator[Finding]:
    """All there is to find, one by one; nothing that goes wrong here ends it."""
    quieten()
    yield Finding("ok", f"lit-qlora {_commit()}, {platform.platform()}{_notebook()}")
    yield _python()
    yield from _guarded("packages", surroundings.packages())
    quieten()  # lightning sets levels of its own
    for part in (surroundings.torchao, surroundings.gpu, surroundings.four_bit, surroundings.host_memory):
        yield from _guarded(part.__name__, part())
    yield from _guarded("token", surroundings.token())
    yield from _guarded("base", _base_and_choices(base, run))


def _guarded(what: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    try:
        yield from findings
    except Exception as error:
        yield Finding("problem", f"{what}: can't be looked at ({surroundings.reason(error)})")


def _python() -> Finding:
    text = f"Python {platform.python_version()}"
    if sys.version_info < (3, 11):  # noqa: UP036  # said before anything that needs it is imported
        return Finding("problem", f"{text}: 3.11 or newer is expected", "take another Python")
    return Finding("ok", text)


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except Exception:
        return "of unknown version"


def _notebook() -> str:
    return (
        ", Colab" if "COLAB_RELEASE_TAG" in os.environ else ", Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else ""
    )


# The base, and what a fit would do with it


def _base_and_choices(asked: str | None, run: Path) -> Iterator[Finding]:
    named = re.search(r"^  base: (\S+)", CONFIG.read_text(encoding="utf-8"), re.MULTILINE)
    name = asked or (named[1] if named else "demo")
    base: Any = None
    try:
        base = _find(name)
        yield Finding("ok", f"base: {base.public_name} may be read, {_gib(2 * base.shape.num_parameters)} in 16 bits")
    except UserError as error:
        text, _, remedy = str(error).removeprefix("model.base: ").partition(";")
        is_offline = type(error.__cause__).__name__ == "LocalEntryNotFoundError"
        # Nobody asked for the default one.
        kind: Any = "note" if is_offline and not asked else "problem"
        offline = " (offline: of its gate nothing is known)" if is_offline else ""
        yield Finding(kind, f"base: {text}{offline}", remedy.strip())
    except ImportError as error:  # the hub's library comes with transformers and datasets
        yield Finding("problem", f"base: {name} can't be looked for ({surroundings.reason(error)})", INSTALL)
    base = base or _known(name)
    num_lora = base.shape.num_lora(16, "all-linear") if base else 0
    try:
        from lit_qlora.model.base import missing_bytes

        download = missing_bytes(base) if base else 0
    except ImportError:
        download = 0
    # The best adapter while it is replaced, two checkpoints with the optimizer's state, and one being written.
    yield from surroundings.disk("the run folder", run, (2 * 4 + 3 * 12) * num_lora, "give --run on another disk")
    yield from surroundings.disk("the hub's cache", surroundings.hub_cache(), download, "set HF_HOME to another disk")
    if base:
        try:
            yield from _choices(base)
        except Exception as error:
            yield Finding("note", f"chosen: can't be told ({surroundings.reason(error)})")


def _find(name: str) -> Any:
    from lit_qlora.model.base import find_base

    if name == "demo" or Path(name).expanduser().exists() or surroundings.reaches_hub():
        return find_base(name)
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # of this process, which has nothing else to ask
    return find_base(name)


def _known(name: str) -> Any:
    """A base whose sizes are known without the hub; None for another."""
    from lit_qlora.model.base import Base
    from lit_qlora.model.shape import known_config

    config = known_config(name)
    return Base(name, name, config) if config else None


def _choices(base: Any) -> Iterator[Finding]:
    """What a fit of ``base`` with the options of colab_t4.yaml decides on this device, and why."""
    from lit_qlora.model.device import AMPERE, choose_precision, current_device

    device = current_device()
    precision, why = choose_precision("auto", device, base.shape.num_parameters)
    yield Finding("ok", f"chosen: precision {precision} ({why})")
    has_flash = device.capability is not None and device.capability >= AMPERE
    below = "as everywhere" if has_flash else "as everywhere; flash_attention_2 needs compute capability 8.0"
    yield Finding("ok", f"chosen: attention sdpa ({below})")
    state = 8 * base.shape.num_lora(16, "all-linear")
    yield Finding("ok", f"chosen: optimizer adamw (its state is {_gib(state)} at rank 16; adamw_8bit takes a quarter)")
    if device.capability is None:
        yield Finding("ok", "chosen: checkpointing none, compile false (no GPU)")
        return
    yield Finding("ok", "chosen: compile true (a GPU)")
    from lit_qlora.callbacks.forecast import kept_words
    from lit_qlora.tools import plan, planned

    found = planned.read(["--config", str(CONFIG), "--model.base", base.name])
    *_, verdict = plan.lines(found)
    yield Finding("ok", f"chosen: checkpointing auto ({kept_words(found.settings.step())}: predicted)")
    if verdict.startswith("does not fit"):
        yield Finding("note", f"configs/{CONFIG.name}: {verdict}", "python main.py plan says more")
    else:
        yield Finding("ok", f"configs/{CONFIG.name}: {verdict}")


def _gib(size: float) -> str:
    return f"{size / surroundings.GIB:.2f} GiB"


# For others to read

PATH = re.compile(r"(?<![\w:/.\\])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"():,;]+)+")


def without_private_parts(text: str) -> str:
    """``text`` without tokens, addresses, this machine's name, and all but the last part of each path."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if secret := os.environ.get(name, "").strip():
            text = text.replace(secret, "(token)")
    text = re.sub(r"hf_\w{6,}", "(token)", text)
    text = re.sub(r"\w+://\S+", "(address)", text)
    text = re.sub(r"host='[^']*'", "host=(host)", text)
    host = socket.gethostname()
    if len(host) > 2:
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "(host)", text)
    return PATH.sub(lambda found: re.split(r"[/\\]", found[0])[-1], text)
