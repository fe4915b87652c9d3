"""Owns what a plan is made from: fit's options under another verb, the card meant, and the lengths of the rows.

Downloads nothing but a config.json of unknown sizes. Knows how each is found; nothing of what is made of it.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_qlora import start
from lit_qlora.callbacks.checkpoints import RunCheckpoints
from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.callbacks.stop import parse_max_time
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.records import Reading
from lit_qlora.data.sources import is_hub_id
from lit_qlora.errors import UserError, require
from lit_qlora.forecast.advice import Settings
from lit_qlora.forecast.cards import DEFAULT, Card, find_card
from lit_qlora.forecast.foresee import ANSWER_SHARE, PROMPT_TOKENS, current_card, guanaco_lengths
from lit_qlora.model import load
from lit_qlora.model.base import Base, find_base, missing_bytes, stored_file
from lit_qlora.model.device import AMPERE, Device, check_attention, choose_precision
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.shape import known_config
from lit_qlora.model.weights import check_weights
from lit_qlora.storage.run import RunFolder
from lit_qlora.trainer import QLoRATrainer, own_callbacks, own_plugins
from lit_qlora.training import QLoRACLI

CHARACTERS_A_TOKEN, TOKENS_A_TURN = 3.3, 6
"""Of Guanaco's conversations with Llama 2's tokenizer, and what the format adds; both measured."""
PUBLISHED = {"timdettmers/openassistant-guanaco": 9846, "mlabonne/guanaco-llama2-1k": 950}
"""Training rows of data sets whose lengths are like Guanaco's."""


class _PlannedTrainer(QLoRATrainer):
    def plan(self) -> None:
        """Say what a fit with these options needs: memory, time, disk. Needs no GPU."""


class _Options(QLoRACLI):
    """fit's parser under this verb's name, with a card to plan for; builds and runs nothing."""

    def __init__(self, command: start.Command) -> None:
        super().__init__(command, ExitStack())

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        self.trainer_class = _PlannedTrainer
        super().setup_parser(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"plan": set()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpu", type=str | None, default=None, help="card to plan for; default: this one, or a T4")
        parser.add_argument("--gpu-gib", type=float | None, default=None, help="memory of the card in GiB instead")
        words = "of the card, as 8.6; default: that of --gpu, 7.5 for one of --gpu-gib alone"
        parser.add_argument("--gpu-capability", type=str | None, default=None, help=f"compute capability {words}")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        return LightningCLI._prepare_subcommand_parser(self, klass, subcommand, **kwargs)

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@dataclass(frozen=True)
class Rows:
    """Lengths of the training rows, and how they are known."""

    lengths: tuple[int, ...]
    answer_share: float
    known_by: str


class Prompts(NamedTuple):
    """Of the sample answers: how many, and tokens of the longest."""

    number: int
    tokens: int
    are_counted: bool


class Planned(NamedTuple):
    """All that a plan is told from."""

    base: Base
    settings: Settings
    rows: Rows
    prompts: Prompts
    precision_reason: str
    download: int
    """Bytes of the base that are not here yet."""
    max_epochs: int
    max_steps: int
    keep_checkpoints: int


def parse(args: list[str]) -> Any:
    """All of fit's options, with their values by ``args`` and the config. Raises as `read` does."""
    completed = start.complete(["fit", *args])
    parsed = _Options(completed._replace(args=["plan", *completed.args[1:]]))
    options = parsed.config["plan"]
    # Of all that fit builds, the classes of the user's choice alone, but for loggers, which may call somebody.
    own = Namespace(trainer=Namespace(callbacks=options.trainer.callbacks, plugins=options.trainer.plugins))
    if own.trainer.callbacks or own.trainer.plugins:
        own = parsed._parser("plan").instantiate_classes(own)
    own_callbacks(own.trainer.callbacks, options.trainer.limit_val_batches != 0)
    own_plugins(own.trainer.plugins)
    return options


def read(args: list[str]) -> Planned:
    """What ``args``, fit's options and a card, stand for.

    Raises UserError for what fit would refuse, too, and SystemExit after ``--help``.
    """
    options = parse(args)
    model = options.model.as_dict()
    needs_ampere = options.trainer.precision == "bf16-mixed" or model["attention"] == "flash_attention_2"
    card = _card(options.gpu, options.gpu_gib, options.gpu_capability, AMPERE if needs_ampere else DEFAULT.capability)
    device = Device(card.name, card.capability)
    trainer, drawn = _checked(options), SampleAnswers(**options.samples.as_dict())
    if model["adapter"]:
        options.data.template = load.template_of(Path(model["adapter"]), options.data.template)
    # The options' own checks, on a base that is always there and for no card.
    module = QLoRAModule(**{**model, "base": "demo", "attention": "sdpa"})
    if module.adapter:
        load.check_settings(module.adapter, module.lora)
    data = ChatDataModule(**options.data.as_dict())
    start.check_graphs(model["cuda_graphs"], data.plan.packed)
    if card.capability < AMPERE:  # above, whether the package is there is the other machine's affair
        check_attention(model["attention"], device)
    precision, reason = choose_precision(options.trainer.precision, device)
    if not (options.gpu or options.gpu_gib is None or options.gpu_capability):
        shown = ".".join(map(str, card.capability))
        reason = f"compute capability {shown} is assumed; --gpu-capability gives another"
    base = _base(model["base"])
    load.check_targets(base, model["target_modules"])
    load.check_rank(base, model["rank"])
    check_weights(base)
    load.check_context(base, data.max_length)
    trainer.datamodule = data  # type: ignore[attr-defined]
    with _offline():
        rows, prompts = _rows(trainer, data, base, drawn)
        download = missing_bytes(base)
    settings = Settings(
        base.shape, card, precision, rows.lengths, rows.answer_share, prompts.tokens, module.lora,
        model["optimizer"], model["checkpointing"], data.plan, data.max_length,
        trainer.accumulate_grad_batches, prompts.number, drawn.max_new_tokens, data.seed, model["cuda_graphs"],
        model["loss_rows"], model["own_layers"] and not load.has_bias(module.adapter), trainer.limit_train_batches,
    )  # fmt: skip
    limit, (epoch, _) = trainer.limit_train_batches, replace(settings, limit=1.0).epoch()
    expected = f"a share of the {epoch.num_micro_batches:,} micro-batches that is one at least"
    require(limit * epoch.num_micro_batches >= 1, "trainer.limit_train_batches", expected, limit)
    length = options.trainer.max_epochs, options.trainer.max_steps
    return Planned(base, settings, rows, prompts, reason, download, *length, options.keep_checkpoints)


def _checked(options: Any) -> QLoRATrainer:
    """A Trainer of these options, which has checked them; checks those of the checkpoints and of time, too.

    Accelerator, precision and the number of a GPU are another machine's affair.
    """
    RunCheckpoints(RunFolder(Path()), options.save_every_steps, options.keep_checkpoints, options.save_every_minutes)
    if options.max_time is not None:
        parse_max_time(options.max_time)
    given = options.trainer.as_dict()
    elsewhere: dict[str, Any] = {"precision": "32-true", "callbacks": None, "logger": False, "plugins": None}
    if given["accelerator"] in ("gpu", "cuda"):
        elsewhere["accelerator"] = "auto"
    if isinstance(given["devices"], list) and len(given["devices"]) == 1:
        elsewhere["devices"] = 1
    try:
        return QLoRATrainer(**{**given, **elsewhere})
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error


def _card(name: str | None, gib: float | None, capability: str | None, assumed: tuple[int, int]) -> Card:
    """The card that is meant; one of which the memory alone is known has the ``assumed`` compute capability."""
    require(gib is None or gib > 0, "gpu-gib", "a number of GiB above 0", gib)
    found = re.fullmatch(r"(\d+)\.(\d)", capability or "7.5")
    if found is None:
        raise UserError(f"gpu-capability: expected two numbers as in 8.6, got {capability!r}")
    if name is None and gib is not None:
        card = Card(f"card of {gib:g} GiB", gib, assumed)
    else:
        card = find_card(name) if name else current_card() or DEFAULT
    card = replace(card, memory_gib=gib) if gib is not None else card
    return replace(card, capability=(int(found[1]), int(found[2]))) if capability else card


def _base(name: str) -> Base:
    """Recognised without the hub where its sizes are known."""
    config = None if Path(name).expanduser().exists() else known_config(name)
    return Base(name, name, config) if config else find_base(name, weights=False)


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is downloaded for a plan: what is in the hub's cache is read, all else is assumed."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _rows(trainer: Any, data: ChatDataModule, base: Base, drawn: SampleAnswers) -> tuple[Rows, Prompts]:
    """The real lengths where rows and tokenizer are at hand; else an assumption that says so."""
    has_tokenizer = True
    try:
        _ = data.tokenizer
    except UserError:
        if any(stored_file(base, name) for name in ("tokenizer.json", "tokenizer.model")):
            raise
        has_tokenizer = False
    prompts = Prompts(len(drawn.prompts or ()) or drawn.count, PROMPT_TOKENS, False)
    if has_tokenizer:
        data.encoder.check_vocabulary(base.shape.vocabulary, base.name)
        drawn.setup(trainer, trainer.lightning_module, "fit")
        if drawn.prompts:
            prompts = _prompts(data, drawn)
    reading = data.reading if has_tokenizer else Reading(data.form, data.strict)
    try:
        train, _ = data.parts(reading).train_and_held_out()
    except UserError:
        if not is_hub_id(data.source):
            raise
        num_rows = PUBLISHED.get(data.source, 1000)
        lengths = guanaco_lengths(num_rows)
        what = f"{num_rows:,} rows" if data.source in PUBLISHED else "lengths unknown: 1,000 rows"
        return Rows(tuple(lengths), ANSWER_SHARE, f"assumed: {what}, their lengths as Guanaco's"), prompts
    if not has_tokenizer:
        lengths = [
            TOKENS_A_TURN * len(conversation.turns)
            + round(sum(len(turn.content) for turn in conversation.turns) / CHARACTERS_A_TOKEN)
            for conversation in train.conversations
        ]
        known_by = f"estimated from {CHARACTERS_A_TOKEN} characters a token: the tokenizer is not here"
        return Rows(tuple(lengths), ANSWER_SHARE, known_by), prompts
    data.setup("fit")
    encoded = data._rows["train"]
    share = sum(encoded.answer_tokens) / sum(encoded.lengths)
    return Rows(tuple(encoded.lengths), share, "counted"), _prompts(data, drawn)


def _prompts(data: ChatDataModule, drawn: SampleAnswers) -> Prompts:
    lengths = [len(data.encoder.prompt(prompt)) for prompt in drawn.choose(data)]
    return Prompts(len(lengths), max(lengths, default=0), True)
