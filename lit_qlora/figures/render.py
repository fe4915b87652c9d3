"""Owns how a card or a page is made from its Jinja template. Knows neither."""

from importlib import resources
from typing import Any

import jinja2


def filled(package: str, file: str, /, **values: Any) -> str:
    """A template with ``values`` in it; in HTML these are text and never markup.

    Args:
        package: package with the template in its folder ``templates``.
        file: its name, which ends in .html.jinja or .md.jinja.
        values: all that the template names.
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
