"""Wrong options of the scripts: one line and status 2, before any run is started."""

import sys

import pytest

from scripts import pin, storm


@pytest.mark.parametrize(
    ("script", "given", "words"),
    [
        (storm, "--runs 0", "--runs"),
        (storm, "--jobs 0", "--jobs"),
        (storm, "--cold 2", "--cold"),
        (storm, "--cold nan", "--cold"),
        (storm, "--minutes -1", "--minutes"),
        (pin, "", "give --write FILE or --compare FILE"),
        (pin, "--compare /nowhere", "--compare: [Errno 2]"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, script, given, words):
    for name in ("warm_up", "all_storms", "command"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["script.py", *given.split()])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("script.py: error: ") and words in last
