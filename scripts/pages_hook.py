"""A hook of mkdocs: links from docs/ to files beside it, such as ../README.md, lead to the repository."""

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Give each link in ``markdown`` that leaves docs/ the repository's address, which pyproject.toml has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return re.sub(r"\]\(\.\./", f"]({project['urls']['Repository']}/blob/main/", markdown)
