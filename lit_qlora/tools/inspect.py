"""Owns the verb inspect: a fit that stops before weights are loaded, and shows what it would learn.

Takes fit's own options, and needs neither GPU nor weights. Knows when its verdict is a failure.
"""

import os
import sys
from pathlib import Path

from lit_qlora.command import Command
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.faults import accepted_kinds
from lit_qlora.errors import UserError
from lit_qlora.model.module import QLoRAModule
from lit_qlora.storage.files import page_path, saved_by, write_file
from lit_qlora.tools.inspecting.look import Look, look
from lit_qlora.tools.inspecting.page import PAGE_MARK, inspection_page
from lit_qlora.tools.inspecting.words import by_kind, inspection_lines
from lit_qlora.training import DryCLI


class InspectCLI(DryCLI):
    """fit's own command, for a look at its rows as training has them."""

    found: Look
    """All that was seen of the rows."""

    def before_instantiate_classes(self) -> None:
        """Check its own options before anything is read."""
        super().before_instantiate_classes()
        options = self.config[self.verb]
        self.accepted = accepted_kinds(options.accept)
        self.page = None if options.html is None else _page_file(options.html)

    def inspect(self, model: QLoRAModule, datamodule: ChatDataModule) -> None:
        """Read every row of ``datamodule``; LightningCLI calls it, with ``model``, as it would the Trainer's method."""
        options, trainer = self.config_init[self.verb], self.trainer
        trainer.datamodule, datamodule.trainer = datamodule, trainer  # type: ignore[attr-defined]
        datamodule.any_number = "unread" not in self.accepted
        self.found = look(trainer, datamodule, options.rows, options.row)


def main(command: Command) -> int:
    """Print what a fit learns.

    Args:
        command: of fit's options, and what is shown.

    Returns:
        The exit status: 1 if a row has a fault that is not accepted.

    Raises:
        UserError: for options that fit would refuse; the page can't be written.
    """
    cli = InspectCLI.of(command)
    seen, whole = cli.found, cli.config[cli.verb].row is not None
    shows_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    print("\n".join(inspection_lines(seen, cli.accepted, shows_colour, whole)))
    if cli.page:
        with saved_by("html"):
            write_file(cli.page, inspection_page(seen, cli.accepted))
        print(f"page: {cli.page}")
    return 1 if by_kind(seen.found, cli.accepted) else 0


def _page_file(name: str) -> Path:
    """The file of the page. Raises UserError where it can't be one, or another file is there already."""
    path = page_path(name)
    if path.exists() and not path.read_bytes().startswith(PAGE_MARK.encode()):
        raise UserError(f"{path} is there, and no page of an inspection", option="html", remedy="give another name")
    return path
