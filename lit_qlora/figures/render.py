"""Owns how a card or a page is made from its Jinja template. Knows neither."""

from importlib import resources
from typing import Any

import jinja2


def filled(package: str, file: str, /, **values: Any) -> str:
    """The template ``file`` of a package's folder ``templates`` with ``values`` in it.

    In HTML, of a file that ends in .html.jinja, these are text and never markup.
    """
    is_page = file.endswith(".html.jinja")
    environment = jinja2.Environment(
        autoescape=is_page,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_page,
        undefined=jinja2.StrictUndefined,
    )
    text = (resources.files(package) / "templates" / file).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)
