"""Owns the conversation at a terminal: its lines and commands, Ctrl-C and Ctrl-D.

Conversations are `Dialog`'s. Knows the answerer as something that streams answers; no ids, no weights.
"""

import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import zip_longest
from pathlib import Path
from shutil import get_terminal_size
from types import FrameType

from lit_qlora.columns import in_column, lines_of
from lit_qlora.console import fitted
from lit_qlora.errors import UserError, excerpt
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools.answering.answerer import Answer
from lit_qlora.tools.answering.dialog import Dialog, cut_note

DIALOG_HELP = """\
/reset        forget the conversation; the system text stays
/system       show the system text; /system TEXT sets it, /system - removes it
/compare      ask adapter and base the last question (else the next one), and
              show both answers side by side; /compare QUESTION asks that one
/save FILE    add the conversation to a .jsonl file that fit can read
/help         show this
/quit         leave, as Ctrl-D does
Each question continues the conversation. A \\ at the end of a line continues
the question on the next line. Ctrl-C stops an answer; what was said so far
stays. A line that begins with a space is a question, even with a / behind it."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters of the terminal."""


def harmless(text: str) -> str:
    """``text`` without control characters of the terminal."""
    return CONTROL.sub("", text)


class Terminal(Dialog):
    """One conversation, typed and printed."""

    _compares_next = _answering = _stopped = False

    def run(self) -> None:
        """Run the conversation until Ctrl-D or /quit."""
        with suppress(ImportError):
            import readline  # noqa: F401  # from here on `input` knows the arrow keys and what was typed before
        base, _ = self.answerer.base.public_name, self.answerer.model
        commands = "/reset begins a new conversation, /help lists the commands, Ctrl-D leaves"
        print(fitted(f"{base} with {self.answerer.adapter}: {commands}"), flush=True)
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            while True:
                try:
                    line = _typed()
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print("\n(Ctrl-D or /quit leaves)")
                    continue
                try:
                    if line.strip().lower().split(" ")[0] == "/quit" and line.startswith("/"):
                        return
                    self._take(line)
                except UserError as error:
                    print(fitted(f"({error})"))
                except KeyboardInterrupt:
                    print("\n(stopped)")
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._answering or self._stopped:  # the second one exits at once, without waiting for a token
            raise KeyboardInterrupt
        self._stopped = True

    def _take(self, line: str) -> None:
        """Execute a command, or ask a question."""
        word, _, rest = line.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset, "/system": self._system, "/compare": self._compare, "/save": self._save,
            "/help": lambda _: print(DIALOG_HELP),
        }  # fmt: skip
        if not line.startswith("/"):
            if word:
                self._ask(line.strip())
        elif word.lower() in commands:
            commands[word.lower()](rest.strip())
        else:
            print(fitted(f"(no command {harmless(word)}; there are {', '.join(commands)}, /quit)"))

    def _ask(self, question: str) -> None:
        if self._compares_next:
            self._compare(question)
            return
        conversation = self._fitting([*self.turns, Turn("user", question)])
        answer = self._answer(conversation, lambda text: print(harmless(text), end="", flush=True))
        print()
        if self._stopped or not answer.stopped:
            print("(stopped)" if self._stopped else cut_note(self.sampling))
        self._print_note(self.remember(question, answer))

    def _print_note(self, note: str) -> None:
        if note:
            print(note)

    def _fitting(self, turns: list[Turn]) -> Conversation:
        """The conversation to ask; prints a notice if it loses first turns."""
        fitting, note = self.fitting(turns)
        self._print_note(note)
        return fitting

    def _answer(self, conversation: Conversation, show: Callable[[str], None]) -> Answer:
        def go_on(text: str) -> bool:
            show(text)
            return not self._stopped

        self._answering, self._stopped = True, False
        try:
            return self.answerer.stream(conversation, self.sampling, go_on)
        finally:
            self._answering = False

    # Commands

    def _reset(self, _: str) -> None:
        self.forget()
        self._compares_next = False
        print("(forgotten; the system text stays)" if self.system else "(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self.set_system("" if text == "-" else text)
        print(f"(system: {self.effective_system or 'none'})")

    def _compare(self, question: str) -> None:
        self._compares_next = not question and not self.turns
        if self._compares_next:
            print("(the next question goes to both)")
            return
        turns = [*self.turns, Turn("user", question)] if question else self.turns[:-1]
        conversation = self._fitting(turns)
        texts = []
        for heading, switch in (("adapter", nullcontext()), ("base", self.answerer.without_adapter())):
            print(f"({heading} …)", end="", flush=True)
            with switch:
                answer = self._answer(conversation, lambda _: None)
            print("\r\x1b[K", end="", flush=True)
            if self._stopped:
                print("(stopped)")
                return
            texts.append(harmless(answer.text) + ("" if answer.stopped else f"\n{cut_note(self.sampling)}"))
            if heading == "adapter":
                of_adapter = answer
        print(two_columns(("adapter", texts[0]), ("base", texts[1]), get_terminal_size().columns))
        if question:
            self._print_note(self.remember(question, of_adapter))

    def _save(self, name: str) -> None:
        if not self.turns:
            raise UserError("nothing was answered yet")
        try:
            words = shlex.split(name)
        except ValueError:  # a quote that nothing closes
            words = [name]
        if len(words) != 1 or not words[0].endswith(".jsonl"):
            raise UserError(f"expected one name that ends in .jsonl, got {excerpt(name)}")
        system = self.effective_system
        rows = [{"role": "system", "content": system}] if system else []
        rows += [{"role": turn.role, "content": turn.content} for turn in self.turns]
        path = Path(words[0]).expanduser()
        size_before = path.stat().st_size if path.is_file() else None
        try:
            with path.open("a+b") as file:
                opens = b""
                if file.tell():
                    file.seek(-1, 2)
                    opens = b"" if file.read() == b"\n" else b"\n"
                file.write(opens + json.dumps({"messages": rows}, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            with suppress(OSError):  # a partial line would damage those before and after it
                path.unlink() if size_before is None else os.truncate(path, size_before)
            raise UserError(f"{path} could not be saved: {error.strerror}") from error
        print(fitted(f"({len(self.turns)} turns added to {path})"))


def _typed() -> str:
    """The line typed, with the next one for as long as it ends in a backslash."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1:] = [lines[-1][:-1], input("  ")]
    return "\n".join(lines)


def two_columns(left: tuple[str, str], right: tuple[str, str], columns: int) -> str:
    """Two headed texts in two columns; one below the other on a narrow terminal.

    Args:
        left: heading and text.
        right: heading and text.
        columns: width of the terminal.
    """
    if columns < 50:
        return "\n".join(f"{heading}:\n{text}" for heading, text in (left, right))
    width = (columns - 3) // 2
    cells = []
    for heading, text in (left, right):
        wrapped = (part for line in text.split("\n") for part in list(lines_of(line.expandtabs(), width)) or [""])
        cells.append([heading, "-" * len(heading), *wrapped])
    rows = zip_longest(*cells, fillvalue="")
    return "\n".join(f"{in_column(one, width)} | {other}".rstrip() for one, other in rows)
