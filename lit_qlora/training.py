"""Owns the verbs fit, validate and test: LightningCLI with this project's Trainer, defaults and run folder.

``main(args)`` runs one of them in-process. Knows how the parts are assembled, and nothing of what they do.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_qlora import start
from lit_qlora.callbacks.checkpoints import RunCheckpoints
from lit_qlora.callbacks.guards import UpdateGuard
from lit_qlora.callbacks.identity import RunIdentity, SamePrompts
from lit_qlora.callbacks.memory import PeakMemory
from lit_qlora.callbacks.metrics import TrainMetrics
from lit_qlora.callbacks.progress import RunProgress
from lit_qlora.callbacks.record import KeepRecord
from lit_qlora.callbacks.report import Report, next_step
from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.callbacks.shard import ShardChoice
from lit_qlora.callbacks.steps import StepCallback, StepEdge
from lit_qlora.callbacks.stop import OwnSignals, StopOnSignal, StopWithoutGain, TimeLimit
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.callbacks.validation import HeldOutMetrics
from lit_qlora.callbacks.warmup import WarmupStep
from lit_qlora.command import Command, with_kept
from lit_qlora.console import complain, note, say
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.templates import is_of_base, read_template
from lit_qlora.devices import starting
from lit_qlora.devices.asked import check_shard, check_shares
from lit_qlora.devices.launchers import requeue
from lit_qlora.devices.world import (
    AllEnd,
    LostError,
    barrier,
    by_first,
    check_same,
    from_first,
    is_first,
    join,
    leave,
    peers,
    silent_unless_first,
    world,
)
from lit_qlora.errors import OutOfRoomError, UserError, one_line
from lit_qlora.figures.record import Record
from lit_qlora.figures.tensorboard import Board
from lit_qlora.forecast import words
from lit_qlora.forecast.advice import once_out_of_room
from lit_qlora.forecast.foresee import foresee
from lit_qlora.model.base import find_base, missing_bytes, split_names
from lit_qlora.model.device import AMPERE, Device, current_device, decide_for
from lit_qlora.model.lora import check_settings, read_format
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.optimizer import check_optimizer
from lit_qlora.model.weights import check_weights
from lit_qlora.options import CONFIG, LINKED, option, plain
from lit_qlora.quiet import quieten
from lit_qlora.ranges import check_ranges, check_scored, max_time_s
from lit_qlora.signals import WARNING, LeftAtOnce
from lit_qlora.signatures import LEARNING, OF_RUN, OF_VERB, SEED, Option
from lit_qlora.storage.checkpoint_io import FolderCheckpointIO, check_checkpoint
from lit_qlora.storage.config_file import as_yaml, flat
from lit_qlora.storage.files import size
from lit_qlora.storage.mirror import Mirror
from lit_qlora.storage.run import FOR_ONE_START, RunFolder, unnamed_run
from lit_qlora.trainer import (
    IN_RUN,
    QLoRATrainer,
    RunParser,
    as_list,
    check_kinds,
    count_processes,
    find_gpus,
    own_callbacks,
    own_plugins,
)

OUT_OF_MEMORY = "out of memory outside of a training step (in a validation, an update or a sample answer)"


class QLoRACLI(LightningCLI):
    """A LightningCLI for fit, validate and test of one run folder.

    Args:
        command: from its verb on.
        stack: holds the run's lock.
    """

    def __init__(self, command: Command, stack: ExitStack) -> None:
        self.command, self.verb = command, command.args[0]
        self.scores = self.verb not in LEARNING
        self.stack = stack
        self.run: RunFolder
        self.resume_from: Path | None = None
        self.mirror: Mirror | None = None
        self.mirrored: Path | None = None
        """Path of the adapter in the mirror."""
        super().__init__(
            QLoRAModule,
            ChatDataModule,
            save_config_callback=None,
            trainer_class=QLoRATrainer,
            parser_class=RunParser,
            args=command.args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The given verb, with the arguments of the Trainer's method that are no options here.

        The parsers of the others, which are not used, would take as long again each.
        """
        data = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        ours = {"ckpt_path", "weights_only", "verbose"}
        return {self.verb: data | ours}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed: always a number, so that a run can be repeated."""
        _add(parser, SEED)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options beside the model's, the data's and the Trainer's."""
        for one in (*OF_RUN, *OF_VERB.get(self.verb, ())):
            _add(parser, one)
        parser.add_lightning_class_args(SampleAnswers, "samples")
        for target, source in LINKED.items():
            parser.link_arguments(source, target)
        assert isinstance(parser, RunParser)
        self.verb_parser = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``; Lightning's own method would warn of the process's, which these were made from."""
        if self.command.kept and self.command.is_newest:
            print(f"   run  {self.command.kept.path}, the newest", flush=True)
        self.config = parser.parse_args(with_kept(self.command))
        options = self.config[self.verb]
        self.verb_parser.check_values(options)
        check_ranges(dict(options.items()))
        options.model.target_modules = split_names(options.model.target_modules)
        # As text, so that the run does not depend on the file or the base.
        template = options.data.template
        base = find_base(options.model.base, weights=False).location if is_of_base(template) else None
        options.data.template = read_template(template, base)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's would load a pickle and let it override the command line."""

    # Before anything is built

    def before_instantiate_classes(self) -> None:
        """Find the run folder, and in it what to resume from or to score; meet the run's other processes."""
        options = self.config[self.verb]
        self.join()
        self.is_named = options.run is not None
        config = option(self.command.args, *CONFIG)
        self.run = RunFolder(Path(options.run) if self.is_named else unnamed_run(config, options.model.base))
        if self.scores:
            check_scored(self.verb, options.trainer.limit_val_batches)
            start.check_score_settings(self.run, self._config_to_keep() | {"max_time": options.max_time})
            adapter, self.resume_from = start.what_to_score(self.run, str(options.ckpt_path))
            if adapter or options.ckpt_path == "base":
                options.model.adapter = str(adapter) if adapter else None
        if options.model.adapter:
            adapter = options.model.adapter
            options.data.template = read_format(Path(adapter)).kept(options.data.template, str(Path(adapter)))

    def join(self) -> None:
        """Meet the other processes of the run, which must have the same configuration and versions.

        Raises `SeveralAsked` if they have to be started first.
        """
        options = self.config[self.verb].trainer
        here = world()
        gpus = find_gpus(options.devices, options.num_nodes, options.accelerator)
        check_kinds(gpus, options.precision)
        if len(gpus) > 1 and options.num_nodes == 1 and here.size == 1:
            raise starting.SeveralAsked(len(gpus))
        if here.size == 1:
            return
        join(gpus[here.local_rank])
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
        check_same(flat(self._config_to_keep()) | versions)

    def _prepare_fit(self) -> None:
        if self.model.adapter:
            check_settings(self.model.adapter, self.model.lora)
        self.settings = self._config_to_keep()
        self.lengths = start.lengths(self.settings)
        by_first(self.open_run)
        path, self.resume_from = from_first((self.run.path, self.resume_from))
        if not is_first():
            self.run = RunFolder(path)

    def check_vocabulary(self) -> None:
        """Raises UserError for a tokenizer that does not match the base."""
        base = self.model.base
        self.datamodule.encoder.check_vocabulary(base.shape.vocabulary, base.name)

    def open_run(self) -> None:
        """Open the run folder of a fit and its copy in the mirror, and find what to resume from.

        Raises:
            UserError: it is another run's, in use, or damaged, or a disk is too small.
            SystemExit: the run is finished.
        """
        options, config = self.config[self.verb], self.settings
        mirror = None if options.mirror is None else Path(options.mirror).expanduser()
        if not self.is_named:
            self.run = start.choose_run(self.run, mirror, config, self.model.base, self.datamodule)
        self.run.open(self.stack)
        if mirror is not None:
            self.mirror = Mirror(self.run, mirror, note, check_checkpoint)
            self.mirror.open(config, lambda file: self.datamodule.changed_since(file) == [])
            self.mirrored = self.mirror.copy.adapter
        try:
            start.check_against_first(self.run, config, self.model.base, self.datamodule)
        except SystemExit:  # finished
            start.check_adapter(self.run, self.model.lora, self.mirrored, is_needed=True)
            print(*next_step(self.run), sep="\n")
            if self.mirror:
                self.mirror.complete()
            raise
        start.check_room(self.run, self.model, options.keep_checkpoints)
        self.resume_from = self.run.checkpoint_to_resume(check_checkpoint)
        start.check_adapter(self.run, self.model.lora, self.mirrored)
        self.run.write_config(as_yaml(config))
        if self.mirror:
            self.mirror.start()
            self.stack.push(self._close_mirror)

    def _close_mirror(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.mirror and not isinstance(error, LeftAtOnce):
            self.mirror.close()

    def _config_to_keep(self) -> dict[str, Any]:
        """The full configuration as plain values, without the options of one start only."""
        try:
            text = self.verb_parser.dump(plain(self.config[self.verb]), format="yaml")
        except ValueError as error:
            raise UserError(
                f"an option of a class of yours has a value that config.yaml can't hold ({one_line(error, 300)})",
                option="trainer",
                remedy="give it as a text, a number or a list of these",
            ) from error
        config = dict(yaml.safe_load(text))
        return {name: value for name, value in config.items() if name not in FOR_ONE_START}

    # Building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this run's callbacks, loggers and checkpoints."""
        base, self.datamodule.tokenizer_option = self.model.base, LINKED["data.tokenizer"]
        config: dict[str, Any] = {**self.config_init[self.verb].get("trainer", {})}
        validates = self.scores or config.get("limit_val_batches") != 0
        given, plugins = own_callbacks(config.get("callbacks"), validates), own_plugins(config.get("plugins"))
        num_processes = count_processes(*(config[name] for name in ("devices", "num_nodes", "accelerator")))
        check_shard(self.model.shard, self.model.shard_to, num_processes)
        check_weights(base)
        self.check_vocabulary()
        if self.scores:
            self.datamodule.recall(self.run.rows)
        else:  # only here, since the model's and the data's options are checked by now
            check_optimizer(self.model.optimizer_name, current_device().is_gpu)
            check_shares(num_processes, int(config["accumulate_grad_batches"]))
            self._prepare_fit()
        shows_bar = config.get("enable_progress_bar") is not False and is_first()
        metrics, throughput = TrainMetrics(), Throughput()
        bars: list[StepCallback] = [RunProgress(metrics, throughput)] if shows_bar else []
        if self.scores:
            # A checkpoint has a word of these, and is to find whom it is for.
            callbacks = [metrics, throughput, UpdateGuard(), ShardChoice(), SamePrompts(), *bars]
            loggers = list[Logger]()
        else:
            callbacks = self._fit_callbacks([metrics, throughput], bars)
            loggers = [*self.own_loggers(), *self.given_loggers()]
        config |= {
            "callbacks": [*given, *callbacks],
            "logger": loggers or False,
            "plugins": [*plugins, FolderCheckpointIO()],
            "default_root_dir": str(self.run.path),
            "num_weights": self.model.base.shape.num_parameters,
            "enable_progress_bar": shows_bar,
        }
        return QLoRATrainer(**config)

    def _fit_callbacks(self, figures: list[StepCallback], bars: list[StepCallback]) -> list[Callback]:
        """The callbacks of a training run."""
        options = self.config_init[self.verb]
        checkpoints = RunCheckpoints(
            self.run, options.save_every_steps, options.keep_checkpoints, options.save_every_minutes
        )
        checkpoints.settings, checkpoints.mirrored = self.settings, self.mirrored
        if self.mirror:
            checkpoints.on_saved = self.mirror.push
        self.checkpoints, stop = checkpoints, StopOnSignal(checkpoints)
        limits = [TimeLimit(max_time_s(options.max_time), self.command.started_at, stop)] if options.max_time else []
        memory, held_out, guard = PeakMemory(), HeldOutMetrics(), UpdateGuard(options.max_nonfinite_losses)
        patience = options.early_stopping
        early = [StopWithoutGain("val/loss", patience=patience)] if patience else []
        resumed = self.resume_from.name if self.resume_from else None
        self.report = Report(self.run, memory, resumed, checkpoints, self.lengths)
        return [
            *([OwnSignals()] if world().size > 1 else []),
            ShardChoice(),
            memory,
            KeepRecord(),  # closes the last step at the end, behind whatever records one then
            guard,
            *figures,
            WarmupStep(),
            held_out,
            options.samples,
            *bars,
            *early,
            *limits,
            RunIdentity(self.resume_from, self.settings, self.run.rows),
            checkpoints,
            self.report,
            stop,
            # Figures first, then what validates, then what saves, then what may end the run.
            StepEdge([guard, *figures, held_out, *bars, *limits, checkpoints, stop]),
        ]

    def own_loggers(self) -> list[Logger]:
        """The loggers of each run: its record, and TensorBoard's file unless disabled."""
        if not is_first():
            return [DummyLogger()]
        shows = self.config_init[self.verb].trainer.logger is not False
        config = self.run.read_config()
        return [Record(self.run, Board(self.run.path, as_yaml(config), flat(config)) if shows else None)]

    def given_loggers(self) -> list[Logger]:
        """The user's own loggers; in other processes than the first, as many that write nothing."""
        made, given = (as_list(config[self.verb].trainer.logger) for config in (self.config_init, self.config))
        loggers = [*map(self._placed, made, given)] if made and isinstance(made[0], Logger) else []
        return loggers if is_first() else [DummyLogger() for _ in loggers]

    def _placed(self, logger: Logger, given: Any) -> Logger:
        """The logger that was ``given``, in the run's folder if it has none of its own."""
        options = given.get("init_args", {})
        if options.get("save_dir") != IN_RUN:
            return logger
        return type(logger)(**{**vars(options), **given.get("dict_kwargs", {}), "save_dir": str(self.run.path)})

    # Running

    def fit(self, model: QLoRAModule, datamodule: ChatDataModule) -> None:
        """Train, from the start or from the newest intact checkpoint.

        Args:
            model: the module.
            datamodule: its rows.

        Raises:
            UserError: for memory that does not suffice, among others.
            AllEnd: it was trained to the end, and not saved.
        """
        say_loading(model, datamodule)
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=self.resume_from)
        except (OutOfRoomError, torch.OutOfMemoryError) as error:
            forecast = foresee(model, datamodule, self.trainer)
            for line in words.forecast_lines(forecast) if forecast else ():
                note(f"  plan  {line}")
            outside = OutOfRoomError(OUT_OF_MEMORY, datamodule.plan.rows)
            found = error if isinstance(error, OutOfRoomError) else outside
            samples, ways = self.config_init[self.verb].samples, list[str]()
            if found is outside and (samples.prompts or samples.count):
                ways.append(f"{'--samples.prompts null ' if samples.prompts else ''}--samples.count 0")
            can_keep_less = model.keeps_pace and (model.kept_layers > 0 or model.together > 1)
            if model.checkpointing != "full" if found is outside else can_keep_less:
                ways.append("--model.checkpointing full")
            if ways:
                raise found.advise(f"give {' or '.join(ways)}, with which this run resumes") from error
            change = once_out_of_room(
                datamodule.plan, datamodule.max_length, self.trainer.accumulate_grad_batches, found.rows
            )
            raise found.advise(f"give {change}, in a new run: --run NAME") from error
        except UserError:
            raise
        except Exception as error:  # such as in a callback of the user's: its traceback, and then this
            steps = self.run.saved_steps()
            saved = f"{self.run.path} is saved up to step {steps[-1]}" if steps else "nothing was saved"
            error.add_note(f"{saved}: the same command, once that is mended, {'resumes' if steps else 'begins anew'}")
            raise
        if not self.report.has_ended:  # killed between its last save and its end: Lightning sees nothing left to do
            self.checkpoints.on_train_end(self.trainer, model)
            self.report.on_train_end(self.trainer, model)
        if self.checkpoints.failures:
            problems = "; ".join(self.checkpoints.failures.values())
            begins = "resumes from the last existing checkpoint" if self.run.saved_steps() else "begins anew"
            complain(f"error: trained to the end, and not saved: {problems}; the same command {begins}")
            raise AllEnd(1)

    def validate(self, model: QLoRAModule, datamodule: ChatDataModule) -> None:
        """Score the held-out rows, or for the verb test the test rows, and print the figures.

        Args:
            model: the module.
            datamodule: its rows.
        """
        say_loading(model, datamodule)
        score = {"validate": self.trainer.validate, "test": self.trainer.test}[self.verb]
        score(model, datamodule=datamodule, ckpt_path=self.resume_from, verbose=False)
        for line in datamodule.describe():
            print(f"  data  {line}")
        print(f" model  {self.resume_from or model.adapter or f'{model.base.name}, no adapter'}")
        for name, value in self.trainer.callback_metrics.items():
            print(f"{name:>16}  {value:.6f}")

    test = validate


class DryCLI(QLoRACLI):
    """fit's command, stopped before weights are loaded: everything is checked and decided, nothing is written."""

    @classmethod
    def of(cls, command: Command) -> Self:
        """Run a command up to where it stops.

        Args:
            command: from its verb on.

        Raises:
            UserError: for what fit refuses.
        """
        quieten()
        with ExitStack() as stack, in_one_line():
            return cls(command, stack)

    def before_instantiate_classes(self) -> None:
        """Drop loggers, which may use the network, and decide everything for `device`."""
        super().before_instantiate_classes()
        self.config[self.verb].trainer.logger = False
        self.stack.enter_context(decide_for(self.device()))

    def device(self) -> Device:
        """The GPU to decide for: one that supports whatever the options ask for."""
        return Device("any GPU", AMPERE, is_here=False)

    def join(self) -> None:
        """Do nothing: there is one process, whatever the options ask for."""

    def open_run(self) -> None:
        """Do nothing: the run folder is not touched."""

    def own_loggers(self) -> list[Logger]:
        """No loggers, since they write."""
        return []


def _add(parser: LightningArgumentParser, one: Option) -> None:
    kind = {} if one.type is None else {"type": one.type}
    parser.add_argument(*one.spelled, default=one.default, help=one.help, **kind)


def say_loading(model: QLoRAModule, datamodule: ChatDataModule) -> None:
    """Print what is read now, which may take minutes, and what is downloaded first.

    Args:
        model: module whose base is read.
        datamodule: DataModule whose rows are read.
    """
    download = missing_bytes(model.base)
    first = f", a download of {size(download)} first" if download else ""
    say("load", f"rows of {datamodule.source}, and the weights of {model.base.name}{first}")


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raises UserError for Lightning's error about options that don't go together."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(one_line(error), option="trainer", remedy="change or leave out that option") from error


def main(command: Command) -> int:
    """Run fit, validate or test.

    Args:
        command: from its verb on.

    Returns:
        The exit status.

    Raises:
        UserError: for what the user can mend.
    """
    quieten()
    try:
        with peers(), silent_unless_first(), ExitStack() as stack, in_one_line():
            QLoRACLI(command, stack)
    except LostError as error:
        if starting.was_started():  # by a command that shows the other's error
            return starting.lose(error)
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(OUT_OF_MEMORY, remedy="give a smaller data.batch_size or data.max_length") from error
    except SystemExit as stop:
        if stop.code == 128 + WARNING and not isinstance(stop, LeftAtOnce) and is_first():  # saved, and mirrored
            requeue()
        if isinstance(stop, AllEnd):
            with suppress(LostError):  # a launcher ends the others as soon as one has ended with a status
                barrier()
            leave()
        return int(stop.code or 0)
    leave()
    return 0
