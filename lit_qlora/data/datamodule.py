"""Owns the wiring of the data: source -> conversations -> ids -> loaders, as a LightningDataModule.

Its neighbours do the work (`records`, `encode`, `cache`, `batching`); it takes tokenizer, vocabulary and prompt format
from the module's base and adapter, and counts optimizer steps. Knows no weights.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from lit_qlora.arguments import checked_arguments
from lit_qlora.batch import Batch
from lit_qlora.console import WIDTH, complain
from lit_qlora.data.batching import (
    BatchPlan,
    PlannedBatches,
    ResumableLoader,
    collate,
    epoch_steps,
    num_cores,
    run_steps,
)
from lit_qlora.data.cache import EncodedRows, encode_records
from lit_qlora.data.chat_template import write_tokenizer
from lit_qlora.data.encode import Encoder, TrainOn
from lit_qlora.data.forms import Form
from lit_qlora.data.held_out import Parts
from lit_qlora.data.records import Reading, Records
from lit_qlora.data.run_rows import RunRows, turns_digest
from lit_qlora.data.sources import ROWS_THEMSELVES, SOURCES, SourceOption, are_here, as_text, paths_of, sources_of
from lit_qlora.data.templates import instead_of, is_of_base, read_template, template_of_base
from lit_qlora.data.tokenizer import load_tokenizer, template_beside
from lit_qlora.data.view import SHORT_AMONG, example_lines
from lit_qlora.devices.dealing import EVALUATED_AT_ONCE
from lit_qlora.devices.world import local_first
from lit_qlora.errors import UserError, excerpt, require
from lit_qlora.text.conversation import Conversation
from lit_qlora.text.formats import PromptFormat, make_format
from lit_qlora.wording import number_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HELD_OUT_SHARE = 0.05
"""Default share of the training rows to hold out."""
CHOSEN_BY = "held-out rows, by which the best adapter was chosen"


class ChatDataModule(LightningDataModule):
    """Conversations to train and to score a chat model on.

    Args:
        source: ``demo``; a local jsonl, json, csv or parquet file (also .gz, .zst); a pattern of files; a folder with
            train.* (and validation.*, test.*), of datasets.save_to_disk, or cloned from the hub; or a hub id, with a
            colon and a split if it is not the training split. Or a table with path, and name (the configuration),
            split, revision, share (of its training rows: 0.5 uses half of them) or columns. Or a list of these.
        form: the form of rows: detected per row (auto), or one for all.
        columns: names of your table's columns for user and assistant (also system, context, history), for messages, or
            for text. Other columns are not used then.
        opening: text of the user for conversations that the assistant begins; default: what the assistant says before
            the user is left out and counted.
        validation_source: held-out rows from elsewhere; default: the source's validation split, else its test split,
            else a share.
        validation_share: share of rows held out if there is no such split, drawn with the seed.
        test_source: rows for ``test``; default: the source's test split if it is not held out, else the held-out rows.
        system: system text for conversations that have none.
        template: how prompts are written, if not in the Llama 2 format: base (the base's own chat template), a
            built-in one by its name, such as chatml, or a file of your own with a Jinja chat template, or its text.
        train_on: learn the answers only, or all of each conversation; with all, plain text can be read, too.
        max_length: tokens of one row; a longer conversation is cut so that answer tokens remain, a longer plain text is
            divided into rows.
        batch_size: rows of one micro-batch.
        batch_tokens: use instead as many rows as fit into this many tokens, padding included.
        packing: put the conversations of a micro-batch into one row, without padding, each attending only to itself;
            needs batch_tokens.
        num_workers: processes that prepare batches ahead; at most the number of cores.
        strict: true: the first row that can't be used is an error; false: up to one in ten is left out and counted.
        tokenizer: hub id or folder of the tokenizer; default: that of the base of the Trainer's module.
        seed: of the order and of the held-out share; the command line takes it from ``seed_everything``.
    """

    @checked_arguments("data", (*SOURCES, "template", "tokenizer"), remedies=dict.fromkeys(SOURCES, ROWS_THEMSELVES))
    def __init__(
        self,
        source: SourceOption = "demo",
        form: Form = "auto",
        columns: dict[str, str] | None = None,
        opening: str | None = None,
        validation_source: SourceOption | None = None,
        validation_share: float = HELD_OUT_SHARE,
        test_source: SourceOption | None = None,
        system: str | None = None,
        template: str | None = None,
        train_on: TrainOn = "answers",
        max_length: int = 1024,
        batch_size: int = 4,
        batch_tokens: int | None = None,
        packing: bool = False,
        num_workers: int = 0,
        strict: bool = False,
        tokenizer: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        Reading(form, columns=columns).check()
        given = {"source": source, "validation_source": validation_source, "test_source": test_source}
        for option, value in given.items():
            if value is not None:
                sources_of(value, f"data.{option}")
        self.source, self.form, self.strict = source, form, strict
        self.columns, self.opening = columns, opening
        self.validation_source, self.validation_share = validation_source, validation_share
        self.test_source = test_source
        self.train_on, self.max_length = train_on, max_length
        self._given = tokenizer, read_template(template), system
        self._awaits_base = is_of_base(template)
        """True if the prompt format is to be read from a base that is not known yet."""
        self.prompt_format = _prompt_format(None if self._awaits_base else self._given[1], system)
        self.plan = BatchPlan(batch_size, batch_tokens, packing)
        self.num_workers = num_workers
        self.tokenizer_name = tokenizer
        self.tokenizer_option = "data.tokenizer" if tokenizer else "model.base"
        """The option that gives the tokenizer; on the command line, it is always the base's."""
        self.seed = seed
        self.any_number = False
        """True to continue however many rows are unusable, as for `inspect`."""
        self._records: dict[str, Records] = {}
        self._rows: dict[str, EncodedRows] = {}
        self.notes = defaultdict[str, list[str]](list)
        """Remarks on the rows of each part beside their counts, such as splits that were not read."""
        self.run_rows: RunRows | None = None
        """The learned and held-out rows of a run, if its rows are scored."""
        self._run_record: Path | None = None

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the base, loaded on first use.

        Raises UserError if none was given, and no Trainer's module has a base.
        """
        expected = "the hub id or folder of the base's, or a Trainer whose module has a base"
        require(self.tokenizer_name is not None, "data.tokenizer", expected, None)
        try:
            return load_tokenizer(str(self.tokenizer_name))
        except UserError as error:
            raise error.replace(option=self.tokenizer_option) from error

    @cached_property
    def encoder(self) -> Encoder:
        """The one encoder of the run; the prompt format is checked on first use.

        Raises UserError as `Encoder` does.
        """
        if self._awaits_base:
            self.prompt_format = _prompt_format(template_of_base(self.tokenizer), self.prompt_format.system)
            self._awaits_base = False
        try:
            return Encoder(self.tokenizer, self.max_length, self.train_on, self.prompt_format)
        except UserError as error:
            template = template_beside(self.tokenizer)
            if error.option != "data.template" or not self.prompt_format.is_given_by(template):
                raise
            problem = f"the base's own can't be learned: {error.problem}"
            raise error.replace(problem=problem, remedy=instead_of(template or "")) from error

    @property
    def reading(self) -> Reading:
        """The settings for reading rows."""
        return self.reading_for(self.encoder.prompt_format)

    def reading_for(self, prompt_format: PromptFormat) -> Reading:
        """The settings for reading rows that ``prompt_format`` writes."""
        is_whole = self.train_on == "all"
        return Reading(self.form, self.strict, prompt_format, self.columns, self.opening, is_whole, self.any_number)

    @local_first()  # the others find what it downloaded and encoded
    def setup(self, stage: str) -> None:
        """Read and encode the rows for ``stage``: ``fit``, ``validate`` or ``test``.

        Args:
            stage: of the Trainer.

        Raises:
            UserError: for unreadable rows, if nothing is left to learn or to score (also by a share of less than one
                micro-batch), and for a tokenizer or template that does not match the Trainer's module.
        """
        if self.trainer is not None:
            self._follow(self.trainer.lightning_module)
        if stage == "fit" and "train" not in self._rows:
            parts = self.parts()
            train, held_out = parts.train_and_held_out()
            notes = self.notes["train"]
            notes += [f"not read of {name}: {', '.join(unread)}" for name, unread in parts.unread().items()]
            notes += [f"{splits.source}: {splits.note}" for splits in parts.splits.values() if splits.note]
            if self.num_workers > num_cores():
                notes.append(f"{num_cores()} of {self.num_workers:,} num_workers, for there are no more cores")
            if self.validation_share != HELD_OUT_SHARE and not parts.draws():
                note = f"validation_share {self.validation_share:g} is not used, for there are held-out rows"
                self.notes["validation"].append(note)
            self._encode("train", train)
            self._encode("validation", held_out)
            self._check_limit("train", "limit_train_batches")
            self._check_devices()
            self._check_limit("validation", "limit_val_batches")
        elif stage == "validate" and "validation" not in self._rows:
            self._encode("validation", self._held_out("validation"))
            self._check_limit("validation", "limit_val_batches")
        elif stage == "test" and "test" not in self._rows:
            self._encode("test", self._test_records())
            self._check_limit("test", "limit_test_batches")

    def _follow(self, module: Any) -> None:
        """Take tokenizer and prompt format from ``module``, its base and its adapter; drop rows encoded for another."""
        base, (tokenizer, template, system) = getattr(module, "base", None), self._given
        if base is None:
            return
        name = tokenizer or base.name
        found = module.format_for(read_template(template, name), system)
        was, now = (self.tokenizer_name, self.prompt_format), (name, found)
        if now != was:
            found.check_system()
            self.tokenizer_name, self.prompt_format = now
            self._awaits_base = False
            for made in (self._records, self._rows, self.notes):
                made.clear()
            for name in ("tokenizer", "encoder", "_first_epoch"):
                self.__dict__.pop(name, None)
        try:
            self.encoder.check_vocabulary(base.shape.vocabulary, base.name)
        except UserError as error:
            if self.tokenizer_name == base.name:
                raise
            has_not = f"{excerpt(base.name)}, the module's base, has not: its vocab_size is {base.shape.vocabulary:,}"
            problem = f"the tokenizer of {excerpt(self.tokenizer_name)} has ids that {has_not}"
            remedy = "leave it out, to use the base's own"
            raise UserError(problem, option="data.tokenizer", remedy=remedy) from error

    def train_dataloader(self) -> ResumableLoader:
        """The loader of the training rows, in groups of similar length, in an order given by the seed.

        Each epoch has its own order, except under ``overfit_batches``, which repeats the same batches. Without a
        Trainer they are those of one device, one per optimizer step; with several devices, each gets all of them and
        computes those dealt to it.

        Raises UserError before `setup`.
        """
        rows, trainer = self._encoded("train"), self.trainer
        overfits = trainer is not None and trainer.overfit_batches > 0  # type: ignore[attr-defined]

        def order(epoch: int) -> list[list[int]]:
            return self._first_epoch if overfits or not epoch else self.plan.epoch(rows.lengths, self.seed, epoch)

        by_trainer: dict[str, Any] = {}
        if trainer is not None:
            by_trainer = {
                "accumulate": trainer.accumulate_grad_batches,
                "device_index": trainer.global_rank,
                "num_devices": trainer.world_size,
                "limit": trainer.limit_train_batches,
                "epoch": trainer.current_epoch,
            }
        workers = min(self.num_workers, num_cores())
        loader = ResumableLoader(rows, order, num_workers=workers, packed=self.plan.packed, **by_trainer)
        loader.made_by = self
        return loader

    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, without fetching a batch.

        Raises UserError without a Trainer, which has the number of epochs.
        """
        trainer = self.trainer
        if trainer is None:
            raise UserError("the steps of a run are counted with its Trainer", option="data", remedy="give it to one")
        loader = self.train_dataloader()
        if not isinstance(loader, ResumableLoader):  # a subclass's own
            return int(trainer.estimated_stepping_batches)
        steps = epoch_steps(loader.length, trainer.accumulate_grad_batches)
        return run_steps(steps, trainer.max_epochs, trainer.max_steps)

    @cached_property
    def _first_epoch(self) -> list[list[int]]:
        """Micro-batches of the first epoch; cached, since the number of steps is read after each step."""
        return self.plan.epoch(self._rows["train"].lengths, self.seed, 0)

    def largest_batch(self, padded: Callable[[int, int], int] = lambda _, tokens: tokens) -> Batch:
        """The training micro-batch with the most tokens, with padding.

        ``padded`` maps a number of rows and their longest to the padded tokens of each.
        """
        lengths, packed = self._rows["train"].lengths, self.plan.packed

        def tokens(rows: Sequence[int]) -> int:
            own = [lengths[row] for row in rows]
            return sum(own) if packed else len(rows) * padded(len(rows), max(own))

        rows = max(self._first_epoch, key=tokens)
        examples = self._rows["train"].examples
        answers = sum(self._rows["train"].answer_tokens[row] for row in rows)
        return collate([(row, examples[row]) for row in rows], answers, self.plan.packed)

    def val_dataloader(self) -> PlannedBatches:
        """The held-out rows, each once, in the same batches each time."""
        return self._evaluated("validation")

    def test_dataloader(self) -> PlannedBatches:
        """The rows of ``test_source``, else of the source's test split, else the held-out ones."""
        return self._evaluated("test")

    def write_tokenizer(self, folder: Path, max_tokens: int) -> None:
        """Write what other programs need to answer as the rows were learned; see `chat_template.write_tokenizer`.

        Args:
            folder: of the adapter.
            max_tokens: the context of the base.
        """
        if self.tokenizer_name is not None:  # as it is for a subclass that makes ids of its own
            write_tokenizer(folder, self.encoder, max_tokens)

    def held_out_prompts(self, count: int) -> list[tuple[Conversation, str]]:
        """The first ``count`` held-out conversations, cut before their first learned answer, each with that answer."""
        prompts = []
        spoken = (one for one in self._records["validation"].conversations if not one.is_text)
        for conversation in islice(spoken, count):
            place = next(place for place in range(1, len(conversation.turns), 2) if conversation.turns[place].learned)
            prompt = Conversation(conversation.turns[:place], conversation.system)
            prompts.append((prompt, conversation.turns[place].content))
        return prompts

    def fingerprints(self) -> dict[str, str]:
        """Digests of the rows of a run, by content, whatever their file or hub id."""
        return {
            "train_rows": self._rows["train"].fingerprint,
            "held_out_rows": self._rows["validation"].fingerprint,
        }

    def order_of_rows(self) -> dict[str, Any]:
        """Everything that decides which rows are in which batch, by option; the rows of ``source`` by their digest.

        Empty before `setup` for a fit.
        """
        if "train" not in self._rows:
            return {}
        plan = self.plan
        options = {"batch_size": plan.rows, "batch_tokens": plan.tokens, "packing": plan.packed, "seed": self.seed}
        # The rows last: another seed draws others, and is what was changed.
        return {f"data.{key}": options[key] for key in options} | {"data.source": self._rows["train"].fingerprint}

    def parts(self, reading: Reading | None = None) -> Parts:
        """The rows to learn, hold out and test on, by the options; ``reading`` replaces the options' own."""
        return Parts(self.source, self.validation_source, self.validation_share, self.seed, reading or self.reading)

    def recall(self, file: Path) -> None:
        """Score the rows of a run that its record in ``file`` names, whatever became of the source since.

        Raises:
            UserError: the record is damaged.
        """
        self._run_record, self.run_rows = file, RunRows.read(file)

    def recorded(self) -> RunRows:
        """The record of which rows are learned and which are held out, for `recall`."""
        train, held_out = (self._records[part].conversations for part in ("train", "validation"))
        return RunRows.of(train, held_out, as_text(self.validation_source))

    def changed_since(self, file: Path) -> list[str] | None:
        """What became of a run's conversations since it began, in words; empty if they are the same.

        None if that is unknown: sources on the hub, and those that are no longer there, are not read.

        Args:
            file: the run's record of them.

        Raises:
            UserError: the record is damaged, or a source that is there can't be read.
        """
        recorded = RunRows.read(file)
        given = [*filter(None, (self.source, self.validation_source))]
        if recorded is None or not all(map(are_here, given)):
            return None
        train, held_out = (records.conversations for records in self.parts().train_and_held_out())
        return recorded.differences(RunRows.of(train, held_out, as_text(self.validation_source)))

    def rows(self, part: str) -> tuple[Records, EncodedRows]:
        """What `setup` read and encoded of a ``part``: ``train``, ``validation`` or ``test``. Raises UserError before
        that.
        """
        rows = self._encoded(part)
        return self._records[part], rows

    def example(self, lines: int = 2) -> list[str]:
        """A short training row as it is learned.

        Args:
            lines: the most to take, up to 2.

        Raises:
            UserError: before `setup`.
        """
        rows = self._encoded("train")
        shortest = min(range(min(SHORT_AMONG, len(rows))), key=lambda row: rows.lengths[row])
        example = rows.examples[shortest]
        return example_lines(self.tokenizer, example["input_ids"], example["labels"], WIDTH - 8, lines)

    def format_notes(self) -> list[str]:
        """Remarks on the prompt format, in lines."""
        return self.encoder.prompt_format.notes(template_beside(self.tokenizer))

    def describe(self) -> list[str]:
        """What was read, learned, cut and left out, in lines for the terminal."""
        lines = self.format_notes()
        for part, rows in self._rows.items():
            records = self._records[part]
            answers = sum(rows.answer_tokens)
            learned = f"{sum(rows.lengths):,} tokens, {answers:,} of them learned"
            used = learned if part == "train" else f"{answers:,} tokens scored"
            lines.append(f"{part}: {number_of(len(rows), 'conversations')} of {records.name}, {used}")
            for source in records.parts:
                lines.append("; ".join([f"{part}: {len(source.conversations):,} of {source.name}", *_counted(source)]))
            of_parts = {what for source in records.parts for what in source.dropped}
            dropped = _counted(records, of_parts)
            longest = f"{self.max_length} tokens"
            encoded = (
                (rows.num_cut, f"conversations cut to {longest}"),
                (rows.num_divided, f"texts longer than {longest}, divided: each stands in several rows"),
                self.encoder.context_only(records.conversations),
                (rows.num_left_out, f"conversations left out: no answer within {longest}"),
            )
            dropped += [number_of(count, what) for count, what in encoded if count]
            dropped += self.notes[part]
            if dropped:
                lines.append(f"{part}: " + "; ".join(dropped))
        return lines

    def _test_records(self) -> Records:
        parts, is_fitted = self.parts(), {"train", "validation"} <= {*self._records}
        rows = self.run_rows or (self.recorded() if is_fitted else None)
        records = parts.test(rows) if self.test_source is None else parts.test_of(self.test_source)
        if records is None:
            self.notes["test"].append(f"these are the {CHOSEN_BY}; data.test_source gives rows of their own")
            return self._held_out("test")
        if rows is not None:
            digests = [*map(turns_digest, records.conversations)]
            for what, known in ((f"are {CHOSEN_BY}", {*rows.held_out}), ("were trained on", rows.train)):
                count = sum(one in known for one in digests)
                if count:
                    self.notes["test"].append(f"{count:,} of {len(digests):,} {what}")
        return records

    def _held_out(self, part: str) -> Records:
        """The rows that the run held out, by its record; without one, by the options."""
        rows = self.run_rows
        if rows is None and self._run_record:
            self.notes[part].append(f"drawn from the source as it is now, for there is no {self._run_record}")
        records, num_gone = self.parts().held_out(rows)
        if rows is not None and num_gone:
            gone = f"{num_gone:,} of the {number_of(len(rows.held_out), 'conversations')} that the run held out"
            places = " and ".join(paths_of(self.source))
            complain(f"warning: {gone} {'is' if num_gone == 1 else 'are'} no longer in {places}, and not scored")
        return records

    def _encode(self, part: str, records: Records) -> None:
        rows = encode_records(records.conversations, self.encoder)
        if not len(rows):
            of_all = f"of {number_of(len(records.conversations), 'conversations')} in {records.name}"
            problem = f"{of_all} none has an answer within {self.max_length} tokens"
            raise UserError(problem, option="data.max_length", remedy="raise it")
        self._records[part], self._rows[part] = records, rows

    def _check_devices(self) -> None:
        trainer = self.trainer
        devices = 1 if trainer is None else getattr(trainer, "num_processes", trainer.world_size)
        if devices > 1 and devices > (count := self.train_dataloader().length):
            is_whole = count == len(self._first_epoch)
            other = "a smaller data.batch_size" if is_whole else "a larger trainer.limit_train_batches"
            problem = f"{devices}, and an epoch has {number_of(count, 'micro-batches')}"
            raise UserError(problem, option="trainer.devices", remedy=f"take fewer, or {other}")

    def _check_limit(self, part: str, option: str) -> None:
        if self.trainer is None:
            return
        trainer: Any = self.trainer
        limit = getattr(trainer, option)
        option = "overfit_batches" if trainer.overfit_batches else option
        if limit == 0 or (isinstance(limit, float) and limit == 1):  # none, which is said elsewhere, or all
            return
        lengths = self._rows[part].lengths
        count = len(self._first_epoch if part == "train" else self.plan.epoch(lengths, seed=0, epoch=0))
        check_limit(option, limit, count)
        if isinstance(limit, float) or limit < count:
            what = "learned in an epoch" if part == "train" else "scored"
            self.notes[part].append(f"not all of these are {what}, by trainer.{option} {limit:g}")

    def _evaluated(self, part: str) -> PlannedBatches:
        rows, trainer = self._encoded(part), self.trainer
        steps = [[batch] for batch in self.plan.epoch(rows.lengths, seed=0, epoch=0)]
        device, devices = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return PlannedBatches(rows, steps, EVALUATED_AT_ONCE * devices, self.plan.packed, device, devices)

    def _encoded(self, part: str) -> EncodedRows:
        """The rows of ``part``. Raises UserError before `setup`."""
        if part not in self._rows:
            stage = {"train": "fit", "validation": "validate"}.get(part, part)
            remedy = f"call setup({stage!r}), as a Trainer does"
            raise UserError(f"the {part} rows have not been read", option="data", remedy=remedy)
        return self._rows[part]


def _counted(records: Records, known: Collection[str] = ()) -> list[str]:
    """Numbers of rows by what became of them, in words, without those that are ``known``."""
    return [number_of(count, what) for what, count in records.dropped.items() if count and what not in known]


def _prompt_format(template: str | None, system: str | None) -> PromptFormat:
    prompt_format = make_format(template, system)
    prompt_format.check_system()  # by a template's own texts, the encoder does
    return prompt_format


def check_limit(option: str, limit: int | float, count: int) -> None:
    """Check that a share of an epoch's micro-batches is at least one.

    Args:
        option: of the Trainer, such as ``limit_val_batches``.
        limit: its value: a number of micro-batches, or a share of them.
        count: micro-batches of the epoch.

    Raises:
        UserError: the share rounds to none.
    """
    expected = f"a share of at least one of the {number_of(count, 'micro-batches')}, or a number of them"
    require(isinstance(limit, int) or limit == 0 or int(limit * count) >= 1, f"trainer.{option}", expected, limit)
