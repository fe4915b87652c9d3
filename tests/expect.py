"""Owns how tests of errors look at one: by option, place and the words that matter, so that prose may be improved; and
the first look at a command line, which finds most."""

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from lit_qlora.errors import UserError
from lit_qlora.secrecy import redact


class ExpectError(Protocol):
    """What `expect_error` is."""

    def __call__(
        self, call: Callable[[], object] | list[str], *words: object, option: str | None = None, place: object = None
    ) -> UserError: ...


def check_line(printed: str, *words: object, begins: str = "") -> None:
    """Check that ``printed`` is one line, how it begins, and that it holds the words that matter."""
    (line,) = printed.strip("\n").splitlines()
    assert line.startswith(begins), line
    assert [word for word in words if str(word) not in line] == [], line


def check_first(verb: str, args: Sequence[str]) -> int:
    """Check the options ``args`` as the command line does before anything heavy is imported."""
    from lit_qlora import precheck  # with jsonargparse, which not every test wants in its process
    from lit_qlora.command import complete

    return precheck.check_first(complete([verb, *args]))


@pytest.fixture
def expect_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ExpectError:
    """Runs a call, or the command line that a list is, which a UserError has to end.

    Its option, its place (None where none is given) and the words that matter are compared, not its prose. A command
    line prints it in one line, and nothing else, with status 2.
    """
    from lit_qlora import cli

    def expect_error(
        call: Callable[[], object] | list[str], *words: object, option: str | None = None, place: object = None
    ) -> UserError:
        if isinstance(call, list):
            raised: list[UserError] = []
            run = cli._run

            def kept(args: list[str]) -> int:
                try:
                    return run(args)
                except UserError as error:
                    raised.append(error)
                    raise

            with monkeypatch.context() as patch:
                patch.setattr(cli, "_run", kept)
                status = cli.main(call)
            printed = capsys.readouterr().err.splitlines()
            assert (status, len(raised)) == (2, 1), printed
            error = raised[0]
            assert printed == [f"error: {redact(str(error))}"]
        else:
            with pytest.raises(UserError) as caught:
                call()
            error = caught.value
        assert (error.option, error.place) == (option, None if place is None else str(place)), str(error)
        assert "\n" not in str(error)
        missing = [word for word in words if str(word) not in str(error)]
        assert not missing, str(error)
        return error

    return expect_error
