"""Wrong options of the scripts: one line and status 2, before any run is started."""

import sys

import pytest

from scripts import address, notebook, pages, pin, screenshots, storm


@pytest.mark.parametrize(
    ("script", "given", "words"),
    [
        (storm, "--runs 0", "--runs"),
        (storm, "--jobs 0", "--jobs"),
        (storm, "--cold 2", "--cold"),
        (storm, "--cold nan", "--cold"),
        (storm, "--minutes nan", "--minutes"),
        (storm, "--kills 0", "--kills"),
        (storm, "--minutes -1", "--minutes"),
        (pin, "", "give --write FILE or --compare FILE"),
        (pin, "--compare /nowhere", "--compare: [Errno 2]"),
        (address, "ftp://github.com/ann/tuner", "argument NEW: expected https://github.com/OWNER/NAME"),
        (address, "https://github.com/ann/tuner twice", "unrecognized arguments: twice"),
        (notebook, "--nothing", "unrecognized arguments: --nothing"),
        (pages, "options.md", "unrecognized arguments: options.md"),
        (screenshots, "--to /dev/null/pictures", "--to: [Errno 20]"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, script, given, words):
    for name in ("warm_up", "all_storms", "command", "move", "_browser", "PAGES"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["script.py", *given.split()])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("script.py: error: ") and words in last
