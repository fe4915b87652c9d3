"""Owns the verbs fit, validate and test: LightningCLI with this project's Trainer, defaults and run folder.

``main(args)`` runs one of them in-process. Knows how the parts are put together, and nothing of what they do.
"""

import json
import os
import shutil
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_qlora.callbacks.checkpoints import RunCheckpoints
from lit_qlora.callbacks.guards import UpdateGuard
from lit_qlora.callbacks.memory import PeakMemory
from lit_qlora.callbacks.metrics import HeldOutMetrics, MetricsFile, TrainMetrics
from lit_qlora.callbacks.progress import RunProgress
from lit_qlora.callbacks.report import Report
from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.callbacks.steps import SeedByPosition
from lit_qlora.callbacks.stop import StopOnSignal
from lit_qlora.callbacks.tensorboard import RunTensorBoard
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.errors import UserError, require
from lit_qlora.model.base import missing_bytes
from lit_qlora.model.device import Precision, choose_precision, current_device
from lit_qlora.model.module import QLoRAModule
from lit_qlora.options import OneLineErrors, check_config_file, option
from lit_qlora.quiet import quieten
from lit_qlora.storage.checkpoint_io import FolderCheckpointIO
from lit_qlora.storage.lock import RunLock
from lit_qlora.storage.run import RUNS, RunFolder, differences, newest_run, open_run

DEMO_CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"

FIXED = ("seed_everything", "model", "data", "trainer.accumulate_grad_batches", "trainer.precision")
"""Settings that may not change while a run goes on: another value would make it another run."""


NOT_OFFERED = {
    "barebones",
    "check_val_every_n_epoch",
    "default_root_dir",
    "enable_autolog_hparams",
    "enable_checkpointing",
    "enable_model_summary",
    "fast_dev_run",
    "max_time",
    "model_registry",
    "num_nodes",
    "num_sanity_val_steps",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "sync_batchnorm",
    "use_distributed_sampler",
}
"""What of Lightning's Trainer this project decides by itself, or has no use for: an option must do something."""


class RunParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, with errors in one line, without shortened names and options that would do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """As LightningCLI's, without the options of the Trainer that are not offered."""
        if not issubclass(lightning_class, Trainer):
            return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)
        return self.add_class_arguments(
            lightning_class,
            nested_key,
            fail_untyped=False,
            instantiate=False,
            sub_configs=True,
            skip=NOT_OFFERED,
        )


class QLoRATrainer(Trainer):
    """Lightning's Trainer with the precision chosen by the device, and evaluation counted over epochs.

    Args:
        precision: auto takes bf16 from compute capability 8.0 on, fp16 below, fp32 on the CPU.
        max_epochs: epochs, unless max_steps ends the run before.
        val_check_interval: micro-batches from one validation to the next, counted over epochs; or a share of an epoch.
        devices: 1, or a list with the number of the one GPU to take.
        gradient_clip_val: highest norm of the gradients.
        log_every_n_steps: optimizer steps from one record of the figures to the next.
    """

    def __init__(
        self,
        *,
        precision: Precision = "auto",
        max_epochs: int = 3,
        val_check_interval: int | float = 500,
        devices: int | str | list[int] = 1,
        gradient_clip_val: float | None = 1.0,
        log_every_n_steps: int = 25,
        **kwargs: Any,
    ) -> None:
        require(log_every_n_steps >= 1, "trainer.log_every_n_steps", "a whole number from 1", log_every_n_steps)
        accumulated = kwargs.get("accumulate_grad_batches", 1)
        require(accumulated >= 1, "trainer.accumulate_grad_batches", "a whole number from 1", accumulated)
        require(max_epochs >= 1 or max_epochs == -1, "trainer.max_epochs", "a whole number from 1", max_epochs)
        max_steps = kwargs.get("max_steps", -1)
        require(max_steps >= 1 or max_steps == -1, "trainer.max_steps", "a whole number from 1, or -1", max_steps)
        require(val_check_interval > 0, "trainer.val_check_interval", "a number above 0", val_check_interval)
        one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
        require(one, "trainer.devices", "one device (several come later)", devices)
        device = current_device(str(kwargs.get("accelerator", "auto")))
        chosen, self.precision_reason = choose_precision(precision, device)
        by_epoch = isinstance(val_check_interval, float)
        kwargs |= {
            "check_val_every_n_epoch": 1 if by_epoch else None,  # None counts on from epoch to epoch
            "num_sanity_val_steps": 0,  # the whole held-out set is scored before the first step
            "enable_checkpointing": False,  # ours falls on the edge between steps, and needs no pickle
            "enable_model_summary": False,  # it counts two 4-bit weights as one
        }
        super().__init__(
            precision=chosen,  # type: ignore[arg-type]  # auto is resolved
            max_epochs=max_epochs,
            val_check_interval=val_check_interval,
            devices=devices,
            gradient_clip_val=gradient_clip_val,
            log_every_n_steps=log_every_n_steps,
            **kwargs,
        )


class QLoRACLI(LightningCLI):
    """fit, validate and test of one run folder.

    Args:
        args: the command line from the verb on.
        stack: holds the run's lock.
    """

    def __init__(self, args: list[str], stack: ExitStack) -> None:
        self.verb = args[0]
        self.stack = stack
        self.run: RunFolder
        self.resume_from: Path | None = None
        super().__init__(
            QLoRAModule,
            ChatDataModule,
            save_config_callback=None,
            trainer_class=QLoRATrainer,
            parser_class=RunParser,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and what of the Trainer's methods is no option of ours."""
        data = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        ours = {"ckpt_path", "weights_only", "verbose"}
        return dict.fromkeys(("fit", "validate", "test"), data | ours)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: always a number, or a run could not be repeated."""
        parser.add_argument("--seed_everything", type=int, default=42, help="seed of everything that is left to chance")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside the model's, the data's and the Trainer's."""
        parser.add_argument(
            "--run", type=str | None, default=None, help="run folder; default: runs/ + the config's name"
        )
        parser.add_argument("--save_every_steps", type=int, default=500, help="optimizer steps between checkpoints")
        parser.add_argument("--keep_checkpoints", type=int, default=2, help="checkpoints kept, the newest ones")
        parser.add_argument(
            "--early_stopping",
            type=int | None,
            default=None,
            help="validations without gain before the run ends",
        )
        parser.add_argument(
            "--max_nonfinite_losses",
            type=int,
            default=3,
            help="losses in a row that are not finite before it stops",
        )
        parser.add_lightning_class_args(SampleAnswers, "samples")
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("seed_everything", "data.seed")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.add_argument(
                "--ckpt_path",
                default="best",
                help="what is scored: best | last | base | an adapter or checkpoint folder",
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args``; Lightning's own would warn of the process's, which these were made from."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """In place of Lightning's, which would load a pickle and let it override the command line."""

    # Before anything is built

    def before_instantiate_classes(self) -> None:
        """Finds the run folder, and in it what to go on from or what to score."""
        options = self.config[self.verb]
        self.run = RunFolder(Path(options.run))
        if self.verb != "fit":
            self._prepare_scoring(str(options.ckpt_path))

    def _prepare_fit(self) -> None:
        if self.run.path.exists() and not self.run.path.is_dir():
            raise UserError(f"run: {self.run.path} is a file, expected a folder; give another one with --run")
        if not (self.run.has_begun() or self.run.is_empty()):
            raise UserError(f"run: {self.run.path} holds other files and no run; give a folder of its own with --run")
        self.run.prepare()
        self.stack.enter_context(RunLock(self.run.path))
        self.stack.callback(self.run.discard_unless_begun)
        config = self._config_to_keep()
        if self.run.has_begun() and self.run.config.is_file():
            self._check_against(self.run.read_config(), config)
        else:
            self.run.config.unlink(missing_ok=True)
        self._check_adapter()
        self._check_room()
        self.resume_from, problems = self.run.last_checkpoint()
        for problem in problems:
            print(f"warning: {problem}; going back to the checkpoint before", file=sys.stderr)
        if problems and self.resume_from is None:
            raise UserError(f"run: no checkpoint in {self.run.checkpoints} is whole; start anew with another --run")
        self.config_text = yaml.safe_dump(config, sort_keys=False)
        self.run.write_config(self.config_text)

    def _check_adapter(self) -> None:
        """An adapter to start from has a rank of its own; another one asked for would be ignored."""
        module: QLoRAModule = self.model
        if module.adapter is None:
            return
        rank = json.loads((module.adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        if rank != module.lora.rank:
            raise UserError(
                f"model.rank: {module.lora.rank}, and the adapter {module.adapter} has rank {rank}; "
                f"give --model.rank {rank}"
            )

    def _check_room(self) -> None:
        """Room for the checkpoints that are kept, one more while it is written, and a base still to be downloaded."""
        module: QLoRAModule = self.model
        num_trained = module.base.shape.num_lora(module.lora.rank, module.lora.target_modules)
        adapters = 2 * 4 * num_trained
        states = 12 * num_trained * (self.config[self.verb].keep_checkpoints + 1)
        self.run.check_room(adapters + states)
        download = missing_bytes(module.base)
        cache = Path(os.environ.get("HF_HOME", Path.home())).expanduser()
        free = shutil.disk_usage(cache if cache.exists() else Path.home()).free
        if free < download:
            raise UserError(
                f"model.base: {module.base.name} is a download of {download / 1e9:.1f} GB, and the disk of the "
                f"hub's cache has {free / 1e9:.1f} GB left; free some, or set HF_HOME to a larger disk"
            )

    def _check_against(self, first: dict[str, Any], now: dict[str, Any]) -> None:
        changed = differences(first, now, FIXED)
        if changed:
            raise UserError(
                f"run: {self.run.path} was started with other settings: {'; '.join(changed)}; "
                "give --run NAME to start another run"
            )
        finished = self.run.finished()
        lengths = ("trainer.max_steps", "trainer.max_epochs", "early_stopping")
        no_further = finished and 0 < now["trainer"].get("max_steps", -1) <= finished["step"]
        if finished and (no_further or not differences(first, now, lengths)):
            print(
                f"{self.run.path} is finished ({finished['step']} of {finished['steps']} steps): nothing to do.\n"
                f"Its adapter: {self.run.adapter}. To start another run, give it a name: --run NAME"
            )
            raise SystemExit(0)

    def _prepare_scoring(self, what: str) -> None:
        adapter: Path | None = None
        if what == "best":
            if not (self.run.adapter / "adapter_config.json").is_file():
                raise UserError(
                    f"ckpt_path: {self.run.path} has no adapter yet; --ckpt_path last or base may be scored"
                )
            adapter = self.run.adapter
        elif what == "last":
            self.resume_from, _ = self.run.last_checkpoint()
            if self.resume_from is None:
                raise UserError(f"ckpt_path: {self.run.path} has no whole checkpoint")
        elif what != "base":
            if not (Path(what) / "adapter_config.json").is_file():
                self.resume_from = Path(what)  # FolderCheckpointIO tells what is wrong with it
            else:
                adapter = Path(what)
        if what == "base" or adapter:
            self.config[self.verb].model.adapter = str(adapter) if adapter else None

    def _config_to_keep(self) -> dict[str, Any]:
        """The whole configuration as plain values, without what holds for one start only."""
        text = self._parser(self.verb).dump(self.config[self.verb], format="yaml")
        config = dict(yaml.safe_load(text))
        return {name: value for name, value in config.items() if name not in ("config", "run")}

    # Building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this run's callbacks, loggers and checkpoints."""
        if self.verb == "fit":  # here, and not before: the model's and the data's options are checked by now
            self._prepare_fit()
        config: dict[str, Any] = {**self._get(self.config_init, "trainer", default={})}
        shows_bar = config.get("enable_progress_bar") is not False
        metrics, throughput = TrainMetrics(), Throughput()
        bars: list[Callback] = [RunProgress(metrics, throughput)] if shows_bar else []
        # A checkpoint has a word of these, and is to find whom it is for.
        callbacks, loggers = [metrics, throughput, UpdateGuard(), *bars], list[Logger]()
        if self.verb == "fit":
            callbacks, loggers = self._fit_parts([metrics, throughput], bars)
        given = config.get("callbacks") or []
        config |= {
            "callbacks": [*(given if isinstance(given, list) else [given]), *callbacks],
            "logger": loggers or False,
            "plugins": [*(config.get("plugins") or []), FolderCheckpointIO()],
            "default_root_dir": str(self.run.path),
            "enable_progress_bar": shows_bar,
        }
        return QLoRATrainer(**config)

    def _fit_parts(self, figures: list[Callback], bars: list[Callback]) -> tuple[list[Callback], list[Logger]]:
        """In the order in which they must hear of a step: figures first, then what saves, then what may end it."""
        options = self.config_init[self.verb]
        checkpoints = RunCheckpoints(self.run, options.save_every_steps, options.keep_checkpoints)
        memory = PeakMemory()
        patience = options.early_stopping
        require(patience is None or patience >= 1, "early_stopping", "none, or a whole number from 1", patience)
        early = [EarlyStopping("val/loss", patience=patience)] if patience else []
        resumed = self.resume_from.name if self.resume_from else None
        callbacks = [
            SeedByPosition(options.data.seed),
            UpdateGuard(options.max_nonfinite_losses),
            *figures,
            memory,
            HeldOutMetrics(),
            options.samples,
            *bars,
            *early,
            checkpoints,
            StopOnSignal(checkpoints),
            Report(self.run, memory, resumed),
        ]
        step = int(resumed.rpartition("-")[2]) if resumed else None
        given = options.trainer.logger
        loggers: list[Logger] = [MetricsFile(self.run.metrics)]
        if given is not False:
            loggers.insert(0, RunTensorBoard(self.run.path, self.config_text, step))
        if given is not None and not isinstance(given, bool):
            loggers += given if isinstance(given, list) else [given]
        return callbacks, loggers

    # Running

    def fit(self, model: QLoRAModule, datamodule: ChatDataModule) -> None:
        """Trains, from the start or from the newest whole checkpoint."""
        self.trainer.fit(model, datamodule=datamodule, ckpt_path=self.resume_from)

    def validate(self, model: QLoRAModule, datamodule: ChatDataModule) -> None:
        """Scores the held-out rows."""
        self._score("validate", "val", model, datamodule)

    def test(self, model: QLoRAModule, datamodule: ChatDataModule) -> None:
        """Scores the test rows."""
        self._score("test", "test", model, datamodule)

    def _score(
        self, verb: Literal["validate", "test"], prefix: str, model: QLoRAModule, datamodule: ChatDataModule
    ) -> None:
        run = getattr(self.trainer, verb)
        run(model, datamodule=datamodule, ckpt_path=self.resume_from, verbose=False)
        figures = self.trainer.callback_metrics
        for line in datamodule.describe():
            print(f"  data  {line}")
        print(f" model  {self.resume_from or model.adapter or f'{model.base.name}, no adapter'}")
        for name in ("loss", "perplexity", "accuracy"):
            print(f"{f'{prefix}/{name}':>16}  {figures[f'{prefix}/{name}']:.6f}")


def main(args: list[str]) -> int:
    """Runs ``args``, the command line from its verb on, and returns the exit status.

    Raises UserError for what the user can mend.
    """
    quieten()
    with ExitStack() as stack:
        try:
            QLoRACLI(_complete(args), stack)
        except MisconfigurationException as error:  # Lightning's word for options that don't go together
            raise UserError(" ".join(str(error).split())) from error
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def _complete(args: list[str]) -> list[str]:
    """Puts in the config and the run folder that the command leaves unsaid; checks the config files."""
    verb, rest = args[0], args[1:]
    if {"-h", "--help"} & {*rest} or any(arg.startswith("--help") for arg in rest):
        return args
    config, run = option(rest, "--config", "-c"), option(rest, "--run")
    if config is None:
        if verb != "fit":
            kept = open_run(Path(run)) if run else newest_run()
            config, run = str(kept.config), str(kept.path)
        elif run and (Path(run) / "config.yaml").is_file():
            config = str(Path(run) / "config.yaml")
        else:
            config = str(DEMO_CONFIG)
        rest = ["--config", config, *rest]
    for index, arg in enumerate(rest):
        if arg in ("--config", "-c") and index + 1 < len(rest):
            check_config_file(Path(rest[index + 1]))
        elif arg.startswith("--config="):
            check_config_file(Path(arg.partition("=")[2]))
    for file in (value for name, value in pairwise(rest) if name in ("--config", "-c")):
        run = run or yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")).get("run")
    if run is None:
        run = str(RUNS / Path(config).stem)
        rest += ["--run", run]
    elif option(rest, "--run") is None:
        rest += ["--run", run]
    return [verb, *rest]
