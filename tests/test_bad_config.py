"""Options that can't be: each ends in one line and status 2, before a model is loaded, and leaves no files."""

import inspect
from pathlib import Path
from typing import get_args

import pytest
from lightning.pytorch.loggers import wandb
from lightning_utilities.core.imports import RequirementCache

from lit_qlora.cli import main
from lit_qlora.model import load
from lit_qlora.model.optimizer import OptimizerName
from lit_qlora.trainer import QLoRATrainer
from tests.expect import ExpectError

OPTIMIZER_NAMES = ", ".join(get_args(OptimizerName))

CASES: list[tuple[str, list[str], str | bytes | None, str | None, str | None, list[str]]] = [
    ("misspelt key", ["--model.rnak", "3"], None, None, None, ["'model.rnak'", "did you mean 'model.rank'"]),
    ("one dash", ["-model.rank", "3"], None, None, None, ["unknown option 'model.rank'; write --model.rank"]),
    ("no dash", ["model.rank=3"], None, None, None, ["unknown option 'model.rank'; write --model.rank"]),
    ("capitals", ["--Learning_Rate", "3"], None, None, None, ["did you mean 'model.learning_rate'"]),
    ("misspelt key in YAML", [], "model:\n  rnak: 3\n", None, None, ["'model.rnak'", "did you mean 'model.rank'"]),
    ("misspelt section in YAML", [], "modle:\n  rank: 3\n", None, None, ["'modle.rank'", "did you mean 'model.rank'"]),
    (
        "misspelt trainer key",
        ["--trainer.max_step", "3"],
        None,
        None,
        None,
        ["'trainer.max_step'", "did you mean 'trainer.max_steps'"],
    ),
    (
        "misspelt data key",
        [],
        "data:\n  batchsize: 3\n",
        None,
        None,
        ["'data.batchsize'", "did you mean 'data.batch_size'"],
    ),
    ("unknown verb option", ["--resume", "x"], None, None, None, ["unknown option 'resume'", "the same command"]),
    ("positional", ["runs/mine"], None, None, None, ["'runs/mine' is the value of no option", "--data.source FILE"]),
    (
        "files that a shell made of a pattern",
        ["--data.source", "a.jsonl", "b.jsonl"],
        None,
        None,
        None,
        ["'b.jsonl' is the value of no option", "'[a.jsonl, b.jsonl]' or a pattern in quotes"],
    ),
    ("value missing", ["--model.rank"], None, None, "model.rank", ["has no value", "--model.rank VALUE"]),
    ("text for number", ["--model.rank", "high"], None, None, "model.rank", ["whole number", "got high"]),
    ("float for int", ["--model.rank", "1.5"], None, None, "model.rank", ["whole number", "got 1.5"]),
    ("rank 0", ["--model.rank", "0"], None, None, "model.rank", ["from 1", "got 0"]),
    ("alpha -1", ["--model.alpha", "-1"], None, None, "model.alpha", ["above 0", "got -1.0"]),
    ("dropout 1", ["--model.dropout", "1"], None, None, "model.dropout", ["from 0", "below 1", "got 1.0"]),
    ("lr 0", ["--model.learning_rate", "0"], None, None, "model.learning_rate", ["above 0", "at most 1", "got 0.0"]),
    ("lr 20", ["--model.learning_rate", "20"], None, None, "model.learning_rate", ["above 0", "at most 1", "got 20.0"]),
    ("warmup 2", ["--model.warmup_ratio", "2"], None, None, "model.warmup_ratio", ["from 0", "below 1", "got 2.0"]),
    (
        "schedule",
        ["--model.schedule", "cosin"],
        None,
        None,
        "model.schedule",
        ["constant, linear, cosine", "got cosin"],
    ),
    (
        "optimizer",
        ["--model.optimizer", "adam"],
        None,
        None,
        "model.optimizer",
        [f"one of {OPTIMIZER_NAMES}", "got adam"],
    ),
    (
        "paged on cpu",
        ["--model.optimizer", "paged_adamw"],
        None,
        None,
        "model.optimizer",
        ["paged_adamw", "no GPU", "adamw_8bit"],
    ),
    (
        "checkpointing",
        ["--model.checkpointing", "some"],
        None,
        None,
        "model.checkpointing",
        ["auto, full, selective, none", "got some"],
    ),
    (
        "target",
        ["--model.target_modules", "q_prj"],
        None,
        None,
        "model.target_modules",
        ["'q_prj'", "all-linear", "did you mean 'q_proj'"],
    ),
    ("base missing", ["--model.base", "./llama"], None, None, "model.base", ["'./llama'", "owner/name"]),
    ("base empty", ["--model.base", ""], None, None, "model.base", ["owner/name", "got ''"]),
    ("mirror a file", ["--mirror", "configs/colab_t4.yaml"], None, None, "mirror", ["is a file", "a folder"]),
    ("mirror empty", ["--mirror", ""], None, None, "mirror", ["folder", "got ''"]),
    (
        "base url",
        ["--model.base", "https://huggingface.co/a/b"],
        None,
        None,
        "model.base",
        ["https://huggingface.co/a/b"],
    ),
    ("adapter missing", ["--model.adapter", "nope"], None, None, None, ["nope is no adapter", "adapter_config.json"]),
    (
        "flash on cpu",
        ["--model.attention", "flash_attention_2"],
        None,
        None,
        "model.attention",
        ["flash_attention_2", "8.0", "sdpa"],
    ),
    (
        "fp16 on cpu",
        ["--trainer.precision", "16-mixed"],
        None,
        None,
        "trainer.precision",
        ["16-mixed", "CUDA", "32-true"],
    ),
    (
        "precision word",
        ["--trainer.precision", "fp16"],
        None,
        None,
        "trainer.precision",
        ["auto, 16-mixed, bf16-mixed, 32-true", "got fp16"],
    ),
    (
        "gpu without gpu",
        ["--trainer.accelerator", "gpu"],
        None,
        None,
        "trainer.accelerator",
        ["no CUDA GPU", "Colab", "nvidia-smi"],
    ),
    (
        "accelerator unknown",
        ["--trainer.accelerator", "quantum"],
        None,
        None,
        "trainer.accelerator",
        ["auto, cpu, gpu, cuda", "got quantum"],
    ),
    ("devices 0", ["--trainer.devices", "0"], None, None, "trainer.devices", ["a number from 1", "got 0"]),
    ("devices many", ["--trainer.devices", "many"], None, None, "trainer.devices", ["auto", "got 'many'"]),
    ("a GPU twice", ["--trainer.devices", "[1, 1]"], None, None, "trainer.devices", ["list of GPUs", "got [1, 1]"]),
    ("devices 4096", ["--trainer.devices", "4096"], None, None, "trainer.devices", ["at most", "CPU", "got 4096"]),
    ("nodes 0", ["--trainer.num_nodes", "0"], None, None, "trainer.num_nodes", ["from 1", "got 0"]),
    (
        "nodes without a launcher",
        ["--trainer.num_nodes", "2", "--trainer.accumulate_grad_batches", "2"],
        None,
        None,
        "trainer.devices",
        ["2 machines", "torchrun"],
    ),
    (
        "more nodes than micro-batches",
        ["--trainer.num_nodes", "2"],
        None,
        None,
        "trainer.devices",
        ["a step has 1 micro-batch", "--trainer.accumulate_grad_batches 2"],
    ),
    ("epochs 0", ["--trainer.max_epochs", "0"], None, None, "trainer.max_epochs", ["from 1", "got 0"]),
    ("steps 0", ["--trainer.max_steps", "0"], None, None, "trainer.max_steps", ["from 1", "got 0"]),
    (
        "val interval 0",
        ["--trainer.val_check_interval", "0"],
        None,
        None,
        "trainer.val_check_interval",
        ["above 0", "got 0"],
    ),
    (
        "val interval -1",
        ["--trainer.val_check_interval", "-1"],
        None,
        None,
        "trainer.val_check_interval",
        ["above 0", "got -1"],
    ),
    (
        "val interval 1.5",
        ["--trainer.val_check_interval", "1.5"],
        None,
        None,
        "trainer.val_check_interval",
        ["up to 1.0", "got 1.5"],
    ),
    (
        "accumulate 0",
        ["--trainer.accumulate_grad_batches", "0"],
        None,
        None,
        "trainer.accumulate_grad_batches",
        ["from 1", "got 0"],
    ),
    (
        "limit train 0",
        ["--trainer.limit_train_batches", "0"],
        None,
        None,
        "trainer.limit_train_batches",
        ["up to 1.0", "got 0"],
    ),
    (
        "limit val -1",
        ["--trainer.limit_val_batches", "-1"],
        None,
        None,
        "trainer.limit_val_batches",
        ["up to 1.0", "got -1"],
    ),
    ("log every 0", ["--trainer.log_every_n_steps", "0"], None, None, "trainer.log_every_n_steps", ["from 1", "got 0"]),
    (
        "clip negative",
        ["--trainer.gradient_clip_val", "-1"],
        None,
        None,
        "trainer.gradient_clip_val",
        ["above 0", "got -1.0"],
    ),
    (
        "clip algorithm",
        ["--trainer.gradient_clip_algorithm", "foo"],
        None,
        None,
        "trainer.gradient_clip_algorithm",
        ["norm, value or none", "got foo"],
    ),
    (
        "not offered",
        ["--trainer.enable_checkpointing", "true"],
        None,
        None,
        None,
        ["unknown option 'trainer.enable_checkpointing'"],
    ),
    ("not offered 2", ["--trainer.strategy", "ddp"], None, None, None, ["unknown option 'trainer.strategy'"]),
    ("batch 0", ["--data.batch_size", "0"], None, None, "data.batch_size", ["at least 1", "got 0"]),
    (
        "tokens below length",
        ["--data.batch_tokens", "10"],
        None,
        None,
        "data.batch_tokens",
        ["data.max_length", "160", "got 10"],
    ),
    (
        "packing alone",
        ["--data.packing", "true"],
        None,
        None,
        "data.packing",
        ["data.batch_tokens", "2048", "got True"],
    ),
    ("max_length 3", ["--data.max_length", "3"], None, None, "data.max_length", ["at least 8", "got 3"]),
    (
        "share 1",
        ["--data.validation_share", "1"],
        None,
        None,
        "data.validation_share",
        ["from 0", "below 1", "got 1.0"],
    ),
    ("workers -1", ["--data.num_workers", "-1"], None, None, "data.num_workers", ["0 or more", "got -1"]),
    (
        "form",
        ["--data.form", "vicuna"],
        None,
        None,
        "data.form",
        ["expected auto, alpaca, dolly, guanaco, ", "'vicuna' is unknown"],
    ),
    ("train_on", ["--data.train_on", "answer"], None, None, "data.train_on", ["answers, all", "got answer"]),
    ("system tag", ["--data.system", "<<SYS>> x"], None, None, "data.system", ["without '<<SYS>>'", "Llama 2"]),
    ("save 0", ["--save_every_steps", "0"], None, None, "save_every_steps", ["from 1", "got 0"]),
    ("save minutes", ["--save_every_minutes", "-3"], None, None, "save_every_minutes", ["above 0", "got -3.0"]),
    ("keep 1", ["--keep_checkpoints", "1"], None, None, "keep_checkpoints", ["from 2", "got 1"]),
    ("early 0", ["--early_stopping", "0"], None, None, "early_stopping", ["from 1", "got 0"]),
    ("nonfinite 0", ["--max_nonfinite_losses", "0"], None, None, "max_nonfinite_losses", ["from 1", "got 0"]),
    (
        "a run without an end",
        ["--trainer.max_epochs", "-1"],
        None,
        None,
        "trainer.max_epochs",
        ["from 1", "trainer.max_steps", "got -1"],
    ),
    ("max_time", ["--max_time", "soon"], None, None, "max_time", ["DD:HH:MM:SS", "00:03:30:00", "got 'soon'"]),
    ("samples -1", ["--samples.count", "-1"], None, None, "samples.count", ["0 or more", "got -1"]),
    ("samples empty", ["--samples.prompts", '["", "x"]'], None, None, "samples.prompts", ["empty", "got ['', 'x']"]),
    (
        "config missing",
        ["--config", "configs/colab_t5.yaml"],
        None,
        None,
        "config",
        ["configs/colab_t5.yaml", "did you mean configs/colab_t4.yaml"],
    ),
    ("config folder", ["--config", "."], None, None, "config", [". is a folder", "YAML"]),
    ("seed text", ["--seed_everything", "x"], None, None, "seed_everything", ["whole number", "got x"]),
    (
        "doubled key",
        [],
        "model:\n  rank: 4\n  rank: 8\n",
        "mine.yaml:3",
        None,
        ["'model.rank'", "second time", "line 2"],
    ),
    ("empty section", [], "model:\n", "mine.yaml:1", None, ["'model' is empty"]),
    ("tab", [], "model:\n\trank: 4\n", "mine.yaml:2", None, ["no valid YAML", "'\\t'"]),
    ("config in config", [], "config: other.yaml\n", "mine.yaml:1", None, ["--config A --config B"]),
    ("list", [], "- model\n", "mine.yaml:1", None, ["'option: value'", "a list"]),
    ("within itself", [], "a: &a [*a]\n", "mine.yaml", None, ["within itself"]),
    ("merged into itself", [], "model: &m\n  <<: *m\n", "mine.yaml", None, ["within itself"]),
    ("nested without end", [], "a: " + 3000 * "[", "mine.yaml", None, ["too deep"]),
    ("list as a name", [], "model:\n  ? [1,2]\n  : 3\n", "mine.yaml:2", None, ["no valid YAML", "unhashable"]),
    ("no such date", [], "run: 2001-99-99\n", "mine.yaml:1", None, ["no valid YAML", "2001-99-99", "timestamp"]),
    ("no such truth", [], "model:\n  rslora: !!bool x\n", "mine.yaml:2", None, ["no valid YAML", "'x'", "bool"]),
    ("no such number", [], "model:\n  rank: !!int x\n", "mine.yaml:2", None, ["no valid YAML", "'x'", "int"]),
    (
        "no such character",
        [],
        'model:\n  base: "\\UFFFFFFFF"\n',
        "mine.yaml:1",
        None,
        ["no valid YAML", "can't be one"],
    ),
    ("a number too long", [], f"model:\n  rank: {5000 * '9'}\n", "mine.yaml:2", None, ["no valid YAML", "99", "int"]),
    ("tag", [], "model:\n  rank: !foo 3\n", "mine.yaml:2", None, ["no valid YAML", "'!foo'"]),
    ("not utf8", [], b"model: \xff\n", "mine.yaml", None, ["not UTF-8", "byte 7"]),
    (
        "callback class",
        [],
        "trainer:\n  callbacks:\n    - class_path: os.system\n",
        None,
        "trainer.callbacks",
        ["Callback or none", "'os.system'"],
    ),
    (
        "callback import",
        [],
        "trainer:\n  callbacks:\n    - class_path: evil.Module\n",
        None,
        "trainer.callbacks",
        ["no class 'evil.Module'", "No module named 'evil'"],
    ),
    ("token", ["--hf_token", "x"], None, None, "hf_token", ["HF_TOKEN"]),
    (
        "logger's key",
        [],
        "trainer:\n  logger:\n    init_args:\n      api_key: x\n",
        "mine.yaml:4",
        "trainer.logger.init_args.api_key",
        ["HF_TOKEN"],
    ),
    ("seed -1", ["--seed_everything", "-1"], None, None, "seed_everything", ["from 0 to 4,294,967,295", "got -1"]),
    (
        "seed too large",
        ["--seed_everything", "5000000000"],
        None,
        None,
        "seed_everything",
        ["from 0 to 4,294,967,295", "got 5000000000"],
    ),
    ("strategy", ["--trainer.strategy", "ddp"], None, None, None, ["unknown option 'trainer.strategy'"]),
    ("a GPU that is not there", ["--trainer.devices", "[5]"], None, None, "trainer.devices", ["no GPU", "got [5]"]),
    (
        "a GPU for a CPU",
        ["--trainer.devices", "[0]", "--trainer.accelerator", "cpu"],
        None,
        None,
        "trainer.devices",
        ["a CPU has no number", "got [0]"],
    ),
    (
        "a callback's option",
        [],
        "trainer:\n  callbacks:\n    class_path: lightning.pytorch.callbacks.Timer\n    init_args: {nope: 3}\n",
        None,
        "trainer.callbacks",
        ["unknown option 'nope'"],
    ),
    (
        "a callback's option, in a list",
        [],
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.Timer\n      init_args: {nope: 3}\n",
        None,
        "trainer.callbacks",
        ["unknown option 'nope'"],
    ),
    (
        "a callback that saves",
        ["--trainer.callbacks", "lightning.pytorch.callbacks.ModelCheckpoint"],
        None,
        None,
        "trainer.callbacks",
        ["checkpoints", "save_every_steps", "got ModelCheckpoint"],
    ),
    (
        "a callback that changes the steps",
        ["--trainer.callbacks+={class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 4}}}"],
        None,
        None,
        "trainer.callbacks",
        ["trainer.accumulate_grad_batches", "got GradientAccumulationScheduler"],
    ),
    (
        "a callback that averages weights, by its short name",
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=EMAWeightAveraging"],
        None,
        None,
        "trainer.callbacks",
        ["averages weights", "got EMAWeightAveraging"],
    ),
    (
        "a callback that finds a rate, dotted",
        [],
        "trainer.callbacks: [{class_path: LearningRateFinder}]\n",
        None,
        "trainer.callbacks",
        ["model.learning_rate", "--run", "got LearningRateFinder"],
    ),
    (
        "a figure that there is not",
        [],
        "trainer:\n  callbacks:\n    class_path: EarlyStopping\n    init_args: {monitor: eval_loss}\n",
        None,
        "trainer.callbacks",
        ["EarlyStopping", "'eval_loss'", "val/loss, val/perplexity, val/accuracy"],
    ),
    (
        "early stopping without validations",
        ["--early_stopping", "3", "--trainer.limit_val_batches", "0"],
        None,
        None,
        "early_stopping",
        ["trainer.limit_val_batches is 0", "got 3"],
    ),
    (
        "accumulation by epoch",
        ["--trainer.accumulate_grad_batches", "{0: 4}"],
        None,
        None,
        "trainer.accumulate_grad_batches",
        ["whole number", "got {0: 4}"],
    ),
    (
        "a second progress bar",
        [],
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.TQDMProgressBar\n",
        None,
        "trainer.callbacks",
        ["trainer.enable_progress_bar", "got TQDMProgressBar"],
    ),
    (
        "Lightning's own word",
        [],
        "trainer:\n  plugins:\n"
        "    - &one {class_path: lightning.pytorch.plugins.environments.LightningEnvironment}\n    - *one\n",
        None,
        "trainer",
        ["multiple values for ClusterEnvironment"],
    ),
    (
        "a callback that refuses its option",
        [],
        "trainer:\n  callbacks:\n    class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "    init_args: {monitor: val/loss, mode: mid}\n",
        None,
        "trainer.callbacks",
        ["EarlyStopping can't be made", "`mode` can be min, max"],
    ),
    (
        "a callback that refuses its option, in a list",
        [],
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "      init_args: {monitor: val/loss, mode: mid}\n",
        None,
        "trainer.callbacks",
        ["EarlyStopping can't be made", "`mode` can be min, max"],
    ),
    (
        "a plugin that saves",
        ["--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"],
        None,
        None,
        "trainer.plugins",
        ["checkpoints", "got AsyncCheckpointIO"],
    ),
    (
        "plugins that save",
        [],
        "trainer:\n  plugins:\n    - class_path: lightning.pytorch.plugins.io.TorchCheckpointIO\n",
        None,
        "trainer.plugins",
        ["checkpoints", "got TorchCheckpointIO"],
    ),
    (
        "a plugin for the precision",
        ["--trainer.plugins", "lightning.pytorch.plugins.precision.DoublePrecision"],
        None,
        None,
        "trainer.plugins",
        ["trainer.precision", "got DoublePrecision"],
    ),
    (
        "less than a micro-batch held out",
        ["--trainer.limit_val_batches", "0.01"],
        None,
        None,
        "trainer.limit_val_batches",
        ["the 21 micro-batches", "got 0.01"],
    ),
    (
        "less than a micro-batch to learn",
        ["--trainer.limit_train_batches", "0.0001"],
        None,
        None,
        "trainer.limit_train_batches",
        ["the 212 micro-batches", "got 0.0001"],
    ),
    ("rank of a giant", ["--model.rank", "193"], None, None, "model.rank", ["at most 192", "got 193"]),
    (
        "longer than the base's context",
        ["--data.max_length", "1025"],
        None,
        None,
        "data.max_length",
        ["at most 1,024", "got 1025"],
    ),
    ("run empty", ["--run", ""], None, None, "run", ["folder", "got ''"]),
    ("run blank", ["--run= "], None, None, "run", ["folder", "got ' '"]),
    ("adapter empty", ["--model.adapter="], None, None, "model.adapter", ["folder", "got ''"]),
    ("cache empty", ["--model.quantized_cache="], None, None, "model.quantized_cache", ["auto, none, or", "got ''"]),
    ("mirror URL", ["--mirror", "s3://a/b"], None, None, "mirror", ["no URL: mount", "got 's3://a/b'"]),
    ("run of two lines", ["--run", "a\nb"], None, None, "run", ["folder, named in one line", "got 'a\\nb'"]),
    ("run null", ["--run", "null"], None, None, "run", ["null is none: leave it out", "got 'null'"]),
]
"""Each case: its name, the command line after ``fit --run run``, a config file of one's own; and of the error
message the place, the option and words that matter."""


@pytest.mark.parametrize(
    ("args", "config", "place", "option", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_bad_option_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expect_error: ExpectError,
    args: list[str],
    config: str | bytes | None,
    place: str | None,
    option: str | None,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    Path("configs").mkdir()
    Path("configs/colab_t4.yaml").write_text("run: x\n")
    if config is not None:
        Path("mine.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
        args = ["--config", "mine.yaml", *args]
    expect_error(["fit", "--run", "./run", *args], *words, option=option, place=place)
    assert not Path("run").exists()


def test_a_logger_whose_package_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_error: ExpectError
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", RequirementCache("wandb-that-is-not-there>=0.12.10"))
    command = ["fit", "--run", "./run", "--trainer.logger", "lightning.pytorch.loggers.WandbLogger"]
    expect_error(command, "WandbLogger", "pip install -U 'wandb-that-is-not-there>=0.12.10'", option="trainer.logger")
    assert not Path("run").exists()


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("args", "config"),
    [
        (["--model.rank", LONG], ""),
        (["--data.form", LONG], ""),
        (["--max_time", LONG], ""),
        (["--model.target_modules", LONG], ""),
        (["--samples.prompts", f'["{LONG}", ""]'], ""),
        (["--data.system", f"<<SYS>>{LONG}"], ""),
        (["--trainer.callbacks", LONG], ""),
        ([f"--{LONG}", "3"], ""),
        ([LONG], ""),
        ([], f"model:\n  rank: {LONG}\n"),
        ([], f"model:\n  rank: {[1] * 3000}\n"),
        ([], f"model: {LONG}\n"),
        ([], f"{LONG}: 3\n"),
        ([], f"model:\n  ? {LONG}\n  : 3\n"),
        ([], f"? {LONG}\n: 1\n? {LONG}\n: 2\n"),
        ([], f"a: !{LONG} 3\n"),
        ([], f"a: *{LONG}\n"),
        ([], f"trainer:\n  callbacks:\n    class_path: {LONG}\n"),
    ],
)
def test_a_long_value_makes_no_long_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], config: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"{config}seed_everything: 1\n")
    assert main(["fit", "--run", "./run", "--config", "mine.yaml", *args]) == 2
    assert len(capsys.readouterr().err) < 450


NO_VALUE = {
    "model.rank": "a whole number",
    "model.alpha": "a number",
    "model.learning_rate": "a number",
    "model.dropout": "a number",
    "model.target_modules": "a text or a list of texts",
    "model.optimizer": f"one of {OPTIMIZER_NAMES}",
    "model.checkpointing": "one of auto, full, selective, none",
    "model.compile": "true or false or auto",
    "data.source": "a text or a list of values or a table",
    "data.batch_size": "a whole number",
    "data.max_length": "a whole number",
    "data.train_on": "one of answers, all",
    "trainer.precision": "one of auto, 16-mixed, bf16-mixed, 32-true",
    "trainer.max_steps": "a whole number",
    "trainer.val_check_interval": "a whole number or a number",
    "trainer.log_every_n_steps": "a whole number",
    "trainer.accumulate_grad_batches": "a whole number",
    "trainer.accelerator": "one of auto, cpu, gpu, cuda",
    "samples.max_new_tokens": "a whole number",
    "seed_everything": "a whole number",
    "save_every_steps": "a whole number",
    "keep_checkpoints": "a whole number",
}
"""Options that take no none, and what they take."""


@pytest.mark.parametrize(("name", "expected"), NO_VALUE.items())
def test_a_key_without_a_value_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_error: ExpectError, name: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    section, _, key = name.rpartition(".")
    Path("mine.yaml").write_text(f"{section}:\n  {key}:\n" if section else f"{key}:\n")
    args = ["fit", "--run", "./run", "--config", "mine.yaml"]
    expect_error(args, "no value", f"expected {expected};", option=name)


@pytest.mark.parametrize("name", ["early_stopping", "model.adapter", "data.batch_tokens", "trainer.gradient_clip_val"])
def test_an_option_that_takes_none_may_stand_without_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    section, _, key = name.rpartition(".")
    Path("mine.yaml").write_text((f"{section}:\n  {key}:\n" if section else f"{key}:\n") + "max_time:\n")
    assert main(["fit", "--run", "./run", "--config", "mine.yaml", "--data.source", "nope.jsonl"]) == 2
    assert "nope.jsonl: no such file" in capsys.readouterr().err


def test_a_lone_key_without_a_value_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_error: ExpectError
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("early_stopping:\n")
    expect_error(["fit", "--run", "./run", "--config", "mine.yaml"], "no value for early_stopping", option="config")


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_empty_run_is_no_newest_run(expect_error: ExpectError, verb: str) -> None:
    expect_error([verb, "--run", ""], "got ''", option="run")


def test_an_empty_run_in_a_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_error: ExpectError
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text('run: ""\n')
    expect_error(["fit", "--config", "mine.yaml"], "got ''", option="run")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


TIMER = "lightning.pytorch.callbacks.Timer"


@pytest.mark.parametrize(
    ("args", "config"),
    [
        (["--trainer.callbacks", TIMER], ""),
        ([], f"trainer:\n  callbacks:\n    class_path: {TIMER}\n"),
        ([], f"trainer:\n  callbacks:\n    class_path: {TIMER}\n    init_args:\n      interval: epoch\n"),
        ([], f"trainer:\n  callbacks:\n    - class_path: {TIMER}\n"),
        ([], "trainer:\n  plugins:\n    class_path: lightning.pytorch.plugins.environments.LightningEnvironment\n"),
    ],
    ids=["one, named", "one", "one with an option", "a list", "a plugin"],
)
def test_a_class_of_ones_own_may_be_one_or_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], config: str
) -> None:
    """The rows are asked for once the Trainer is there."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"{config}seed_everything: 1\n")
    assert main(["fit", "--run", "./run", "--config", "mine.yaml", "--data.source", "nope.jsonl", *args]) == 2
    assert "nope.jsonl: no such file" in capsys.readouterr().err


def test_a_value_that_a_config_file_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_error: ExpectError
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("odd_callback.py").write_text(
        "from typing import Any\n\nfrom lightning.pytorch import Callback\n\n\n"
        "class Odd(Callback):\n    def __init__(self, thing: Any = object()):\n        pass\n"
    )
    args = ["fit", "--run", "./run", "--trainer.callbacks", "odd_callback.Odd"]
    expect_error(args, "config.yaml can't hold", "a text, a number", option="trainer")
    assert not Path("run").exists()


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_limit_says_int_before_float(part: str) -> None:
    """Lightning's Optional[Union[int, float]] need not: typing returns an equal union that was made before."""
    limit = inspect.signature(QLoRATrainer).parameters[f"limit_{part}_batches"]
    assert str(limit.annotation) == "int | float | None"


def _never(*_: object) -> None:
    raise AssertionError("a model was loaded")


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 25
