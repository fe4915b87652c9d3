"""Options that can't be: each ends in one line and status 2, before a model is loaded, and leaves nothing behind."""

# ruff: noqa: E501  # a message is shown as the user reads it: in one line
import inspect
from pathlib import Path

import pytest
from lightning.pytorch.loggers import wandb
from lightning_utilities.core.imports import RequirementCache

from lit_qlora.cli import main
from lit_qlora.model import load
from lit_qlora.trainer import QLoRATrainer

SECRET = (
    "it holds a password or a token, and options are kept in the run's files; put a token for the hub into the "
    "environment as HF_TOKEN, and fetch by hand what else needs one"
)
WITHIN_ITSELF = "something in it stands within itself (& and *), or is nested too deep"
CASES: list[tuple[str, list[str], str | bytes | None, str]] = [
    ("misspelt key", ["--model.rnak", "3"], None, "unknown option 'model.rnak'; did you mean 'model.rank'?"),
    ("misspelt key in YAML", [], "model:\n  rnak: 3\n", "unknown option 'model.rnak'; did you mean 'model.rank'?"),
    ("misspelt section in YAML", [], "modle:\n  rank: 3\n", "unknown option 'modle.rank'; did you mean 'model.rank'?"),
    (
        "misspelt trainer key",
        ["--trainer.max_step", "3"],
        None,
        "unknown option 'trainer.max_step'; did you mean 'trainer.max_steps'?",
    ),
    (
        "misspelt data key",
        [],
        "data:\n  batchsize: 3\n",
        "unknown option 'data.batchsize'; did you mean 'data.batch_size'?",
    ),
    ("unknown verb option", ["--resume", "x"], None, "unknown option 'resume'; the accepted ones are listed by --help"),
    ("positional", ["runs/mine"], None, "unknown option 'runs/mine'; the accepted ones are listed by --help"),
    ("value missing", ["--model.rank"], None, "argument --model.rank: expected one argument"),
    ("text for number", ["--model.rank", "high"], None, "model.rank: expected int, got high"),
    ("float for int", ["--model.rank", "1.5"], None, "model.rank: expected int, got 1.5"),
    ("rank 0", ["--model.rank", "0"], None, "model.rank: expected a whole number from 1, got 0"),
    ("alpha -1", ["--model.alpha", "-1"], None, "model.alpha: expected a number above 0, got -1.0"),
    ("dropout 1", ["--model.dropout", "1"], None, "model.dropout: expected a share from 0 to below 1, got 1.0"),
    (
        "lr 0",
        ["--model.learning_rate", "0"],
        None,
        "model.learning_rate: expected a number above 0, at most 1, got 0.0",
    ),
    (
        "lr 20",
        ["--model.learning_rate", "20"],
        None,
        "model.learning_rate: expected a number above 0, at most 1, got 20.0",
    ),
    (
        "warmup 2",
        ["--model.warmup_ratio", "2"],
        None,
        "model.warmup_ratio: expected a share from 0 to below 1, got 2.0",
    ),
    (
        "schedule",
        ["--model.schedule", "cosin"],
        None,
        "model.schedule: expected one of 'constant', 'linear', 'cosine', got cosin",
    ),
    (
        "optimizer",
        ["--model.optimizer", "adam"],
        None,
        "model.optimizer: expected one of 'adamw', 'adamw_8bit', 'paged_adamw', 'paged_adamw_8bit', got adam",
    ),
    (
        "paged on cpu",
        ["--model.optimizer", "paged_adamw"],
        None,
        "model.optimizer: paged_adamw pages a GPU's memory, and there is no GPU; take adamw or adamw_8bit",
    ),
    (
        "checkpointing",
        ["--model.checkpointing", "some"],
        None,
        "model.checkpointing: expected one of 'auto', 'full', 'selective', 'none', got some",
    ),
    (
        "target",
        ["--model.target_modules", "q_prj"],
        None,
        "model.target_modules: 'q_prj' is none of all-linear, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; did you mean 'q_proj'?",
    ),
    (
        "base missing",
        ["--model.base", "./llama"],
        None,
        "model.base: no folder './llama'; give a hub id (owner/name) or a folder",
    ),
    (
        "base empty",
        ["--model.base", ""],
        None,
        "model.base: expected demo, a folder or a hub id (owner/name), got ''",
    ),
    ("mirror empty", ["--mirror", ""], None, "mirror: expected a folder, got ''"),
    (
        "base url",
        ["--model.base", "https://huggingface.co/a/b"],
        None,
        "model.base: no folder 'https://huggingface.co/a/b'; give a hub id (owner/name) or a folder",
    ),
    ("adapter missing", ["--model.adapter", "nope"], None, "nope is no adapter: it has no adapter_config.json"),
    (
        "flash on cpu",
        ["--model.attention", "flash_attention_2"],
        None,
        "model.attention: flash_attention_2 needs compute capability 8.0 or above, CPU has less; use sdpa",
    ),
    (
        "fp16 on cpu",
        ["--trainer.precision", "16-mixed"],
        None,
        "trainer.precision: 16-mixed needs a CUDA GPU, and there is none; use auto (32-true on a CPU)",
    ),
    (
        "precision word",
        ["--trainer.precision", "fp16"],
        None,
        "trainer.precision: expected one of 'auto', '16-mixed', 'bf16-mixed', '32-true', got fp16",
    ),
    (
        "gpu without gpu",
        ["--trainer.accelerator", "gpu"],
        None,
        "trainer.accelerator: gpu, and torch sees no CUDA GPU here; on Colab choose one (Runtime, Change runtime type), elsewhere check the driver (nvidia-smi), or leave it at auto",
    ),
    (
        "accelerator unknown",
        ["--trainer.accelerator", "quantum"],
        None,
        "trainer.accelerator: expected one of auto, cpu, gpu, cuda, got 'quantum'",
    ),
    ("devices 2", ["--trainer.devices", "2"], None, "trainer.devices: expected one device (several come later), got 2"),
    ("epochs 0", ["--trainer.max_epochs", "0"], None, "trainer.max_epochs: expected a whole number from 1, got 0"),
    ("steps 0", ["--trainer.max_steps", "0"], None, "trainer.max_steps: expected a whole number from 1, or -1, got 0"),
    (
        "val interval 0",
        ["--trainer.val_check_interval", "0"],
        None,
        "trainer.val_check_interval: expected a number above 0, got 0",
    ),
    (
        "val interval -1",
        ["--trainer.val_check_interval", "-1"],
        None,
        "trainer.val_check_interval: expected a number above 0, got -1",
    ),
    (
        "val interval 1.5",
        ["--trainer.val_check_interval", "1.5"],
        None,
        "trainer.val_check_interval: expected a whole number of micro-batches, or a share of an epoch up to 1.0, got 1.5",
    ),
    (
        "accumulate 0",
        ["--trainer.accumulate_grad_batches", "0"],
        None,
        "trainer.accumulate_grad_batches: expected a whole number from 1, got 0",
    ),
    (
        "limit train 0",
        ["--trainer.limit_train_batches", "0"],
        None,
        "trainer.limit_train_batches: expected a whole number of micro-batches, or a share up to 1.0, got 0",
    ),
    (
        "limit val -1",
        ["--trainer.limit_val_batches", "-1"],
        None,
        "trainer.limit_val_batches: expected a whole number of micro-batches, or a share up to 1.0, got -1",
    ),
    (
        "log every 0",
        ["--trainer.log_every_n_steps", "0"],
        None,
        "trainer.log_every_n_steps: expected a whole number from 1, got 0",
    ),
    (
        "clip negative",
        ["--trainer.gradient_clip_val", "-1"],
        None,
        "trainer.gradient_clip_val: expected none, or a number above 0, got -1.0",
    ),
    (
        "clip algorithm",
        ["--trainer.gradient_clip_algorithm", "foo"],
        None,
        "trainer.gradient_clip_algorithm: expected 'norm', 'value', none; got foo",
    ),
    (
        "not offered",
        ["--trainer.enable_checkpointing", "true"],
        None,
        "unknown option 'trainer.enable_checkpointing'; the accepted ones are listed by --help",
    ),
    (
        "not offered 2",
        ["--trainer.num_nodes", "2"],
        None,
        "unknown option 'trainer.num_nodes'; the accepted ones are listed by --help",
    ),
    ("batch 0", ["--data.batch_size", "0"], None, "data.batch_size: expected at least 1 row, got 0"),
    (
        "tokens below length",
        ["--data.batch_tokens", "10"],
        None,
        "data.batch_tokens: expected none, or at least data.max_length (160), got 10",
    ),
    (
        "packing alone",
        ["--data.packing", "true"],
        None,
        "data.packing: expected data.batch_tokens beside it, say 2048, got True",
    ),
    ("max_length 3", ["--data.max_length", "3"], None, "data.max_length: expected at least 8 tokens, got 3"),
    (
        "share 1",
        ["--data.validation_share", "1"],
        None,
        "data.validation_share: expected a share from 0 to below 1, got 1.0",
    ),
    ("workers -1", ["--data.num_workers", "-1"], None, "data.num_workers: expected 0 or more processes, got -1"),
    (
        "form",
        ["--data.form", "alpaca"],
        None,
        "data.form: expected one of 'auto', 'guanaco', 'llama2', 'messages', 'sharegpt', got alpaca",
    ),
    ("train_on", ["--data.train_on", "answer"], None, "data.train_on: expected one of 'answers', 'all', got answer"),
    (
        "system tag",
        ["--data.system", "<<SYS>> x"],
        None,
        "data.system: expected a text without Llama 2's tags, got '<<SYS>> x'",
    ),
    ("save 0", ["--save_every_steps", "0"], None, "save_every_steps: expected a whole number from 1, got 0"),
    (
        "save minutes",
        ["--save_every_minutes", "-3"],
        None,
        "save_every_minutes: expected none, or a number above 0, got -3.0",
    ),
    ("keep 1", ["--keep_checkpoints", "1"], None, "keep_checkpoints: expected a whole number from 2, got 1"),
    ("early 0", ["--early_stopping", "0"], None, "early_stopping: expected none, or a whole number from 1, got 0"),
    (
        "nonfinite 0",
        ["--max_nonfinite_losses", "0"],
        None,
        "max_nonfinite_losses: expected a whole number from 1, got 0",
    ),
    (
        "a run without an end",
        ["--trainer.max_epochs", "-1"],
        None,
        "trainer.max_epochs: expected a whole number from 1, or one for trainer.max_steps, got -1",
    ),
    ("max_time", ["--max_time", "soon"], None, "max_time: expected DD:HH:MM:SS, such as 00:03:30:00, got 'soon'"),
    ("samples -1", ["--samples.count", "-1"], None, "samples.count: expected 0 or more, got -1"),
    (
        "samples empty",
        ["--samples.prompts", '["", "x"]'],
        None,
        "samples.prompts: expected no empty ones, got ['', 'x']",
    ),
    (
        "config missing",
        ["--config", "configs/colab_t5.yaml"],
        None,
        "config: no file configs/colab_t5.yaml; did you mean configs/colab_t4.yaml?",
    ),
    ("config folder", ["--config", "."], None, "config: . is a folder, expected a YAML file"),
    ("seed text", ["--seed_everything", "x"], None, "seed_everything: expected int, got x"),
    (
        "doubled key",
        [],
        "model:\n  rank: 4\n  rank: 8\n",
        "mine.yaml:3: 'model.rank' stands here a second time (first in line 2); keep one",
    ),
    ("empty section", [], "model:\n", "mine.yaml:1: section 'model' is empty; fill it or remove the line"),
    ("tab", [], "model:\n\trank: 4\n", "mine.yaml:2: no valid YAML: found character '\\t' that cannot start any token"),
    (
        "config in config",
        [],
        "config: other.yaml\n",
        "mine.yaml:1: a config file can't name another; give several with --config A --config B",
    ),
    ("list", [], "- model\n", "mine.yaml:1: expected 'option: value' lines, got a list"),
    ("within itself", [], "a: &a [*a]\n", f"mine.yaml: {WITHIN_ITSELF}"),
    ("merged into itself", [], "model: &m\n  <<: *m\n", f"mine.yaml: {WITHIN_ITSELF}"),
    ("nested without end", [], "a: " + 3000 * "[", f"mine.yaml: {WITHIN_ITSELF}"),
    ("list as a name", [], "model:\n  ? [1,2]\n  : 3\n", "mine.yaml:2: no valid YAML: found unhashable key"),
    ("no such date", [], "run: 2001-99-99\n", "mine.yaml: no valid YAML: month must be in 1..12"),
    ("no such truth", [], "model:\n  rslora: !!bool x\n", "mine.yaml: no valid YAML: 'x'"),
    (
        "tag",
        [],
        "model:\n  rank: !foo 3\n",
        "mine.yaml:2: no valid YAML: could not determine a constructor for the tag '!foo'",
    ),
    ("not utf8", [], b"model: \xff\n", "mine.yaml: not UTF-8 (byte 7); save it as UTF-8"),
    (
        "callback class",
        [],
        "trainer:\n  callbacks:\n    - class_path: os.system\n",
        "trainer.callbacks: expected list[Callback], Callback, none; got [{'class_path': 'os.system'}]",
    ),
    (
        "callback import",
        [],
        "trainer:\n  callbacks:\n    - class_path: evil.Module\n",
        "trainer.callbacks: expected list[Callback], Callback, none; got [{'class_path': 'evil.Module'}]",
    ),
    ("token", ["--hf_token", "x"], None, f"hf_token: {SECRET}"),
    (
        "logger's key",
        [],
        "trainer:\n  logger:\n    init_args:\n      api_key: x\n",
        f"mine.yaml:4: trainer.logger.init_args.api_key: {SECRET}",
    ),
    (
        "seed -1",
        ["--seed_everything", "-1"],
        None,
        "seed_everything: expected a whole number from 0 to 4,294,967,295, got -1",
    ),
    (
        "seed too large",
        ["--seed_everything", "5000000000"],
        None,
        "seed_everything: expected a whole number from 0 to 4,294,967,295, got 5000000000",
    ),
    (
        "strategy",
        ["--trainer.strategy", "ddp"],
        None,
        "unknown option 'trainer.strategy'; the accepted ones are listed by --help",
    ),
    (
        "a GPU that is not there",
        ["--trainer.devices", "[5]"],
        None,
        "trainer.devices: expected 1, for there is no GPU here, got [5]; leave it out",
    ),
    (
        "a GPU for a CPU",
        ["--trainer.devices", "[0]", "--trainer.accelerator", "cpu"],
        None,
        "trainer.devices: expected 1, for a CPU has no number, got [0]; leave it out",
    ),
    (
        "a callback's option",
        [],
        "trainer:\n  callbacks:\n    class_path: lightning.pytorch.callbacks.Timer\n    init_args: {nope: 3}\n",
        "trainer.callbacks: expected list[Callback], Callback, none; got {'class_path': 'lightning.pytorch.callbacks.Timer', 'init_args': {'nope': 3}}",
    ),
    (
        "a callback's option, in a list",
        [],
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.Timer\n      init_args: {nope: 3}\n",
        "trainer.callbacks: expected list[Callback], Callback, none; got [{'class_path': 'lightning.pytorch.callbacks.Timer', 'init_args': {'nope': 3}}]",
    ),
    (
        "a callback that saves",
        ["--trainer.callbacks", "lightning.pytorch.callbacks.ModelCheckpoint"],
        None,
        "trainer.callbacks: expected none that writes checkpoints (save_every_steps and save_every_minutes say when one is written), got ModelCheckpoint; leave it out",
    ),
    (
        "a callback that changes the steps",
        ["--trainer.callbacks+={class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 4}}}"],
        None,
        "trainer.callbacks: expected none that changes the steps (trainer.accumulate_grad_batches says what each has), got GradientAccumulationScheduler; leave it out",
    ),
    (
        "a callback that averages weights, by its short name",
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=EMAWeightAveraging"],
        None,
        "trainer.callbacks: expected none that averages weights (the adapter saved is the one that was scored; model.schedule lets rates fall), got EMAWeightAveraging; leave it out",
    ),
    (
        "a callback that finds a rate, dotted",
        [],
        "trainer.callbacks: [{class_path: LearningRateFinder}]\n",
        "trainer.callbacks: expected none that sets the learning rate (model.learning_rate does; try several, each with its --run), got LearningRateFinder; leave it out",
    ),
    (
        "a figure that there is not",
        [],
        "trainer:\n  callbacks:\n    class_path: EarlyStopping\n    init_args: {monitor: eval_loss}\n",
        "trainer.callbacks: EarlyStopping monitors 'eval_loss', expected one of val/loss, val/perplexity, val/accuracy",
    ),
    (
        "early stopping without validations",
        ["--early_stopping", "3", "--trainer.limit_val_batches", "0"],
        None,
        "early_stopping: expected none where trainer.limit_val_batches is 0, got 3",
    ),
    (
        "accumulation by epoch",
        ["--trainer.accumulate_grad_batches", "{0: 4}"],
        None,
        "trainer.accumulate_grad_batches: expected int, got {0: 4}",
    ),
    (
        "a second progress bar",
        [],
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.TQDMProgressBar\n",
        "trainer.callbacks: expected no other progress bar (trainer.enable_progress_bar says whether there is one), got TQDMProgressBar; leave it out",
    ),
    (
        "Lightning's own word",
        [],
        "trainer:\n  plugins:\n    - &one {class_path: lightning.pytorch.plugins.environments.LightningEnvironment}\n    - *one\n",
        "trainer: Received multiple values for ClusterEnvironment flags in `plugins`. Expected one value for each type at most.; change or leave out that option",
    ),
    (
        "a callback that refuses its option",
        [],
        "trainer:\n  callbacks:\n    class_path: lightning.pytorch.callbacks.StochasticWeightAveraging\n    init_args: {swa_lrs: 0.1, swa_epoch_start: -1}\n",
        "lightning.pytorch.callbacks.StochasticWeightAveraging can't be made: swa_epoch_start should be a >0 integer or a float between 0 and 1.",
    ),
    (
        "a callback that refuses its option, in a list",
        [],
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.StochasticWeightAveraging\n      init_args: {swa_lrs: 0.1, swa_epoch_start: -1}\n",
        "lightning.pytorch.callbacks.StochasticWeightAveraging can't be made: swa_epoch_start should be a >0 integer or a float between 0 and 1.",
    ),
    (
        "a plugin that saves",
        ["--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"],
        None,
        "trainer.plugins: expected none that writes checkpoints (a run goes on only from this project's own), got AsyncCheckpointIO; leave it out",
    ),
    (
        "plugins that save",
        [],
        "trainer:\n  plugins:\n    - class_path: lightning.pytorch.plugins.io.TorchCheckpointIO\n",
        "trainer.plugins: expected none that writes checkpoints (a run goes on only from this project's own), got TorchCheckpointIO; leave it out",
    ),
    (
        "a plugin for the precision",
        ["--trainer.plugins", "lightning.pytorch.plugins.precision.DoublePrecision"],
        None,
        "trainer.plugins: expected none for the precision (trainer.precision says it), got DoublePrecision; leave it out",
    ),
    (
        "less than a micro-batch held out",
        ["--trainer.limit_val_batches", "0.01"],
        None,
        "trainer.limit_val_batches: expected a share that comes to at least one of the 21 micro-batches, or a whole number of them, got 0.01",
    ),
    (
        "less than a micro-batch to learn",
        ["--trainer.limit_train_batches", "0.0001"],
        None,
        "trainer.limit_train_batches: expected a share that comes to at least one of the 212 micro-batches, or a whole number of them, got 0.0001",
    ),
    (
        "rank of a giant",
        ["--model.rank", "193"],
        None,
        "model.rank: expected at most 192, the hidden size of demo, got 193",
    ),
    (
        "longer than the base's context",
        ["--data.max_length", "1025"],
        None,
        "data.max_length: expected at most 1,024 tokens, the max_position_embeddings of demo, got 1025",
    ),
    ("run empty", ["--run", ""], None, "run: expected a folder, got ''"),
    ("run blank", ["--run= "], None, "run: expected a folder, got ' '"),
    ("run null", ["--run", "null"], None, "run: expected a folder, got None"),
]
"""What it is called, the command line behind ``fit --run run``, a config file of one's own, and what is said."""


@pytest.mark.parametrize(("args", "config", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_option_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    config: str | bytes | None,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    Path("configs").mkdir()
    Path("configs/colab_t4.yaml").write_text("run: x\n")
    if config is not None:
        Path("mine.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
        args = ["--config", "mine.yaml", *args]
    assert main(["fit", "--run", "./run", *args]) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert not Path("run").exists()


def test_a_logger_whose_package_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", RequirementCache("wandb-that-is-not-there>=0.12.10"))
    assert main(["fit", "--run", "./run", "--trainer.logger", "lightning.pytorch.loggers.WandbLogger"]) == 2
    assert capsys.readouterr().err == (
        "error: lightning.pytorch.loggers.WandbLogger can't be made: Requirement 'wandb-that-is-not-there>=0.12.10' "
        "not met. HINT: Try running `pip install -U 'wandb-that-is-not-there>=0.12.10'`\n"
    )
    assert not Path("run").exists()


NO_VALUE = {
    "model.rank": "int",
    "model.alpha": "float",
    "model.learning_rate": "float",
    "model.dropout": "float",
    "model.target_modules": "str or list[str]",
    "model.optimizer": "one of 'adamw', 'adamw_8bit', 'paged_adamw', 'paged_adamw_8bit'",
    "model.checkpointing": "one of 'auto', 'full', 'selective', 'none'",
    "model.compile": "bool or one of 'auto'",
    "data.source": "str",
    "data.batch_size": "int",
    "data.max_length": "int",
    "data.train_on": "one of 'answers', 'all'",
    "trainer.precision": "one of 'auto', '16-mixed', 'bf16-mixed', '32-true'",
    "trainer.max_steps": "int",
    "trainer.val_check_interval": "int or float",
    "trainer.log_every_n_steps": "int",
    "trainer.accumulate_grad_batches": "int",
    "trainer.accelerator": "str",
    "samples.max_new_tokens": "int",
    "seed_everything": "int",
    "save_every_steps": "int",
    "keep_checkpoints": "int",
}
"""Options that take no none, and what they take."""


@pytest.mark.parametrize(("name", "expected"), NO_VALUE.items())
def test_a_key_without_a_value_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    section, _, key = name.rpartition(".")
    Path("mine.yaml").write_text(f"{section}:\n  {key}:\n" if section else f"{key}:\n")
    assert main(["fit", "--run", "./run", "--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err == (
        f"error: {name}: has no value, expected {expected}; give one, or leave the line out\n"
    )


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("early_stopping:\n")
    assert main(["fit", "--run", "./run", "--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: config: has no value for early_stopping and says nothing else; give one\n"
    )


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_empty_run_is_no_newest_run(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, "--run", ""]) == 2
    assert capsys.readouterr().err == "error: run: expected a folder, got ''\n"


def test_an_empty_run_in_a_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text('run: ""\n')
    assert main(["fit", "--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err == "error: run: expected a folder, got ''\n"
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("odd_callback.py").write_text(
        "from typing import Any\n\nfrom lightning.pytorch import Callback\n\n\n"
        "class Odd(Callback):\n    def __init__(self, thing: Any = object()):\n        pass\n"
    )
    assert main(["fit", "--run", "./run", "--trainer.callbacks", "odd_callback.Odd"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: trainer: an option of a class of yours has a value that config.yaml can't hold (")
    assert told.endswith("); give it as a text, a number or a list of these\n")
    assert told.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_limit_says_int_before_float(part: str) -> None:
    """As Lightning's Optional[Union[int, float]] needn't: typing hands out an equal union that was made before."""
    limit = inspect.signature(QLoRATrainer).parameters[f"limit_{part}_batches"]
    assert str(limit.annotation) == "int | float | None"


def _never(*_: object) -> None:
    raise AssertionError("a model was loaded")


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 25
