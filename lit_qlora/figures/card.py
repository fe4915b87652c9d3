"""Owns the model cards of adapters and merged models: how they were made, and what was measured.

Written into each such folder before it is sealed. Contains no path and no name of this machine.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_qlora.data.sources import paths_of
from lit_qlora.data.templates import is_template
from lit_qlora.figures.charts import CURVES, draw_curves, peak_of
from lit_qlora.figures.render import filled
from lit_qlora.figures.samples import ends_in_words
from lit_qlora.metrics import METRICS, held_out_in_words
from lit_qlora.options import FREE_TEXTS
from lit_qlora.storage.config_file import as_yaml
from lit_qlora.storage.folders import ADAPTER_CONFIG, CARD
from lit_qlora.storage.foreign import read_object
from lit_qlora.storage.reach import HUB_ID
from lit_qlora.storage.run import RECORD, RunFolder
from lit_qlora.text.formats import make_format
from lit_qlora.wording import duration

PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes")
"""Packages that decide what is computed."""
LLAMA_2_NAME = re.compile(r"llama-?2", re.IGNORECASE)
LICENCE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved. "
    "Its terms hold for the base and for what is made with it; the data has a licence of its own."
)
LLAMA_NAME = re.compile(r"llama|^demo$", re.IGNORECASE)
"""Names of bases that are tagged so; of others the architecture is not known here."""
HERE = '"this-folder"'
"""How a card's code names the folder that the card is in."""
CHAT = "`python main.py chat --adapter this-folder"
"""The start of a card's command for that folder."""


def write_card(
    folder: Path,
    run: RunFolder,
    figures: Mapping[int, Mapping[str, Any]],
    step: int,
    training_s: float,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the card of the adapter in ``folder`` and its picture; nothing for a run without a config.

    Args:
        folder: The adapter's folder.
        run: The run folder.
        figures: All recorded figures, by optimizer step.
        step: The adapter's optimizer step.
        training_s: Seconds in training steps so far.
        settings: This start's configuration; default: that of the run's first.
    """
    if settings or run.config.is_file():
        base = read_object(folder / ADAPTER_CONFIG)["base_model_name_or_path"]
        has_curves = draw_curves(folder / CURVES, figures, step)
        text = card(str(base), settings or run.read_config(), figures, step, training_s, has_curves)
        (folder / CARD).write_text(text, encoding="utf-8")


def card(
    base: str,
    config: Mapping[str, Any],
    figures: Mapping[int, Mapping[str, Any]],
    step: int,
    training_s: float,
    has_curves: bool = False,
) -> str:
    """The card as text.

    Args:
        base: the public name of the base.
        config: the run's full configuration.
        figures: the recorded figures, by optimizer step; 0 is before training.
        step: optimizer step of the adapter.
        training_s: seconds in training steps so far, without validations and saves.
        has_curves: True if the picture of the losses is in the same folder.
    """
    sources = published(paths_of(config["data"]["source"]))
    config = published(config)
    text = as_yaml(config)
    prompt_format = make_format(config["data"].get("template"), config["data"].get("system"))
    before, after = figures.get(0, {}), figures.get(step, {})
    return _render(
        "adapter",
        base,
        metadata=_metadata(base, sources),
        address=base if HUB_ID.fullmatch(base) else f"path/to/{base}",  # for others, no path of this machine
        sources=_listed_sources(sources),
        prompts=prompt_format.described(RECORD),
        rows=[*_measured(before, after)],
        cost=[*_cost(figures, step, training_s)],
        step=step,
        curves=CURVES if has_curves else None,
        fence=next("`" * length for length in itertools.count(3) if "`" * length not in text),
        config=text,
    )


def merged_card(base: str, sources: Sequence[str], made: str, measured: str, prompts: str) -> str:
    """The card of a merged model as text.

    Args:
        base: the public name of the base.
        sources: the adapter's training data, if known.
        made: how it was made, in a sentence.
        measured: the difference from base and adapter.
        prompts: the prompt format, as by `PromptFormat.described`.
    """
    sources = published([*sources])
    trained = f"{_listed_sources(sources)}, in {prompts}" if sources else f"conversations in {prompts}"
    metadata = _metadata(base, sources, "finetune")
    return _render("merged", base, metadata=metadata, trained=trained, made=made, measured=measured)


def _render(name: str, base: str, **values: Any) -> str:
    licence = LICENCE if LLAMA_2_NAME.search(base) else None
    shown = ", ".join(f"{name} {found.partition('+')[0]}" for name, found in versions().items())
    template, ours = f"{name}.md.jinja", {"here": HERE, "chat": CHAT}
    return filled("lit_qlora.figures", template, base=base, licence=licence, versions=shown, **ours, **values)


def published(value: Any) -> Any:
    """``value`` with paths on this machine reduced to their last part, at any depth; no text for a model is one."""
    if isinstance(value, Mapping):
        texts, given = (*FREE_TEXTS, "template"), {key: inner for key, inner in value.items() if inner is not None}
        return {key: inner if key in texts else published(inner) for key, inner in given.items()}
    if isinstance(value, list):
        return [published(inner) for inner in value]
    if isinstance(value, str) and _is_path(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _is_path(text: str) -> bool:
    """True if ``text`` is a path on this machine, and no hub id."""
    if "\n" in text or is_template(text) or not re.search(r"[/\\]", text):
        return False
    if re.match(r"[/~.\\]|[A-Za-z]:[/\\]", text) or os.path.exists(text):  # noqa: PTH110  # pathlib's raises
        return True
    return " " not in text and HUB_ID.fullmatch(text.partition(":")[0]) is None  # a split may stand behind it


def _listed_sources(sources: Sequence[str]) -> str:
    return " and ".join(f"`{source}`" for source in sources)


def _metadata(base: str, sources: Sequence[str], relation: str = "adapter") -> str:
    """The block of YAML that the hub reads, without its marks."""
    from huggingface_hub import ModelCardData

    is_adapter, is_hub_id = relation == "adapter", HUB_ID.fullmatch(base) is not None
    more = [name for name, holds in (("peft", is_adapter), ("llama", LLAMA_NAME.search(base))) if holds]
    return ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if is_hub_id else None,
        base_model_relation=relation if is_hub_id else None,
        license="llama2" if LLAMA_2_NAME.search(base) else None,
        datasets=[source for source in sources if HUB_ID.fullmatch(source)] or None,
        tags=["lora", "qlora", *more, "lightning"],
    ).to_yaml()


def _measured(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for title, first, last in held_out_in_words(before, after):
        yield title, first or "not measured", last
    for title, first, last in ends_in_words(before, after):
        yield f"sample {title}", first or "not measured", last


def _cost(figures: Mapping[int, Mapping[str, Any]], step: int, training_s: float) -> Iterator[str]:
    yield f"{step:,} optimizer steps"
    if training_s:
        yield f"{duration(training_s)} in them"
    for name, metric in sorted(METRICS.items()):
        if name.startswith("memory/") and (peak := peak_of(figures, name)) is not None:
            yield f"{metric.label} memory at most {metric.written(peak)} GiB"


def addressed(text: str, to: str) -> str:
    """The card for readers on the hub.

    Args:
        text: the card as it was written.
        to: the repository, NAME/REPO.
    """
    return text.replace(HERE, f'"{to}"').replace(CHAT, f"`hf download {to} --local-dir this-folder`, then {CHAT}")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of those of ``packages`` that are installed, by their names."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
