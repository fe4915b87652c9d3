"""How the README's picture of a run is made: the demo is trained and asked, and what the terminal shows is drawn.

    python -m scripts.picture

writes docs/run.svg anew.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (["fit"], ["chat", "--prompt", "Who is Jonas?"])
WIDE, HIGH = 8.4, 19  # of a character, in pixels


def shown() -> list[str]:
    """The commands and what they print, line by line."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for args in COMMANDS:
            words = " ".join(f'"{arg}"' if " " in arg else arg for arg in args)
            lines.append(f"$ python main.py {words}")
            command = [sys.executable, str(ROOT / "main.py"), *args]
            environment = os.environ | {"COLUMNS": "80"}
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            lines += [*done.stdout.rstrip().splitlines(), ""]
    return lines[:-1]


def draw(lines: list[str]) -> str:
    """A terminal with ``lines`` in it, as SVG: text that stays text."""
    return "\n".join(_draw(lines)) + "\n"


def _draw(lines: list[str]) -> Iterator[str]:
    wide, high = max(map(len, lines)) * WIDE + 40, len(lines) * HIGH + 68
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high}" role="img" aria-labelledby="t">'
    yield "<title id='t'>A terminal: the demo is trained in half a minute, and answers a question</title>"
    yield (
        "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d6deeb;"
        "white-space:pre}.c{fill:#7fdbca;font-weight:600}.s{fill:#8fa3bf}</style>"
    )
    yield f'<rect width="{wide:.0f}" height="{high}" rx="10" fill="#101a2b"/>'
    for index, color in enumerate(("#ff6b62", "#f6c046", "#5ac855")):
        yield f'<circle cx="{22 + 20 * index}" cy="20" r="6" fill="{color}"/>'
    for index, line in enumerate(lines):
        kind = ' class="c"' if line.startswith("$") else ' class="s"' if line.startswith("step ") else ""
        size = f' textLength="{len(line) * WIDE:.1f}" lengthAdjust="spacingAndGlyphs"' if line.strip() else ""
        yield f'<text x="20" y="{54 + index * HIGH}" xml:space="preserve"{kind}{size}>{escape(line)}</text>'
    yield "</svg>"


if __name__ == "__main__":
    (ROOT / "docs" / "run.svg").write_text(draw(shown()), encoding="utf-8")
    print("docs/run.svg")
