"""Owns the saved copy of the notebook, with what its cells print on the demo: docs/colab-demo.ipynb.

    python scripts/notebook.py            # some minutes; in a clone of its own, without a GPU

Needs requirements-dev.txt. Long outputs are cut, and no path of this machine stands in it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COPY = ROOT / "docs" / "colab-demo.ipynb"
LONGEST = 6_000
"""Characters of one output, but for pictures and pages."""
LARGEST = 300_000
"""Bytes of the copy."""
FORM = {"CONFIG": "configs/demo.yaml", "QUESTION": "Who goes everywhere with Silas?", "MERGE": "True", "MIRROR": ""}


def main() -> None:
    """Run all cells on the demo, and write what they show."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import nbformat  # here: --help needs none
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory(prefix="lit_qlora-notebook-") as folder:
        clone = Path(folder) / "lit-qlora"
        for part in ("lit_qlora", "configs", "notebooks"):
            shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("main.py", "requirements.txt"):
            shutil.copyfile(ROOT / file, clone / file)
        jupyter = Path(folder) / "jupyter"
        install = [sys.executable, "-m", "ipykernel", "install", "--prefix", str(jupyter), "--name", "saved"]
        subprocess.run(install, check=True, capture_output=True)
        os.environ["JUPYTER_PATH"] = str(jupyter / "share" / "jupyter")
        os.environ |= {f"LIT_QLORA_{name}": value for name, value in FORM.items()}
        notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
        place = {"metadata": {"path": str(clone / "notebooks")}}
        NotebookClient(notebook, kernel_name="saved", timeout=900, resources=place, coalesce_streams=True).execute()
        _tidy(notebook, [(str(clone), "lit-qlora"), (sys.prefix, "python"), (str(Path.home()), "~")])
        nbformat.write(notebook, COPY)
    assert COPY.stat().st_size < LARGEST, f"{COPY} is too large"
    print(f"{COPY.stat().st_size:,} bytes: {COPY}")


def _tidy(notebook: Any, places: list[tuple[str, str]]) -> None:
    """Cuts what is long, and names no place of this machine."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            texts = output.get("data", output)
            for kind in ("text", "text/plain", "text/html"):
                if isinstance(texts.get(kind), str):
                    texts[kind] = _plain(texts[kind], places, cut=kind != "text/html")


def _plain(text: str, places: list[tuple[str, str]], cut: bool) -> str:
    for place, name in places:
        text = text.replace(place, name)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.split("\r")[-1] for line in text.split("\n")]  # each state of a bar draws over the one before
    text = "\n".join(lines)
    return text if len(text) <= LONGEST or not cut else f"{text[: LONGEST // 2]}\n…\n{text[-LONGEST // 2 :]}"


if __name__ == "__main__":
    main()
