"""Owns the verb report: a run in one page, written anew from its folder. What is on it is `figures.report`'s."""

from lit_qlora.console import complain
from lit_qlora.figures.report import damage, write_report
from lit_qlora.storage.files import saved_by
from lit_qlora.storage.run import open_run


def report(run: str | None = None) -> None:
    """Write a run's report.html: curves, memory, samples, decisions, configuration.

    Args:
        run: run folder; default: the run that was started last.

    Raises:
        UserError: there is no such run, or the page can't be written.
    """
    folder = open_run(run)
    for problem in damage(folder):
        complain(f"warning: {problem}")
    with saved_by("run"):
        print(write_report(folder))
