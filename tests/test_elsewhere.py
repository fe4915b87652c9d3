"""Options of other programs: each is answered with one of ours, which there is, or with how it is here."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from lit_qlora import cli
from lit_qlora.elsewhere import answers, here
from lit_qlora.errors import UserError
from lit_qlora.model.base import check_lora, find_base, split_names
from lit_qlora.model.generate import Sampling
from lit_qlora.trainer import RunParser
from tests.expect import ExpectError

COMMON = {
    "lr": "model.learning_rate",
    "out": "run",
    "file": "data.source",
    "mask_inputs": "data.train_on",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "per_device_train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "output_dir": "run",
    "lora_r": "model.rank",
    "lora_alpha": "model.alpha",
    "lora_dropout": "model.dropout",
    "seed": "seed_everything",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.base",
    "dataset_name": "data.source",
    "save_steps": "save_every_steps",
    "eval_steps": "trainer.val_check_interval",
    "logging_steps": "trainer.log_every_n_steps",
    "warmup_steps": "model.warmup_ratio",
    "optim": "model.optimizer",
    "lr_scheduler_type": "model.schedule",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "gradient_checkpointing": "model.checkpointing",
    "report_to": "trainer.logger",
    "micro_batch_size": "data.batch_size",
    "sequence_len": "data.max_length",
    "val_set_size": "data.validation_share",
    "context_length": "data.max_length",
    "max_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "text_column": "data.columns",
    "prompt_column": "data.columns",
    "response_column": "data.columns",
    "dataset_text_field": "data.columns",
    "split": "data.source",
    "lora_path": "model.adapter",
    "adapter_path": "model.adapter",
    "cuda": "trainer.accelerator",
    "cuda_visible_devices": "trainer.devices",
    "save_total_limit": "keep_checkpoints",
    "flash_attn": "model.attention",
    "use_liger_kernel": "model.own_layers",
    "activation_offloading": "model.offload",
    "train_on_responses_only": "data.train_on",
    "chat_template": "data.template",
}
"""What command lines of Hugging Face's trainers, TRL, Axolotl, LLaMA-Factory and LitGPT most often have."""
OURS = {
    "weight_decay": "model.weight_decay",
    "packing": "data.packing",
    "learning_rate": "model.learning_rate",
    "max_steps": "trainer.max_steps",
    "warmup_ratio": "model.warmup_ratio",
    "target_modules": "model.target_modules",
    "max_length": "data.max_length",
    "batch_size": "data.batch_size",
}
"""The same names, which ours have in a section."""


@pytest.fixture(scope="module")
def parser(parser_of: Callable[[str], RunParser]) -> RunParser:
    """fit's own."""
    return parser_of("fit")


def _error(parser: RunParser, *args: str) -> str:
    with pytest.raises(UserError) as caught:
        parser.parse_args([*args])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _spellings(name: str) -> list[tuple[str, ...]]:
    dashed = name.replace("_", "-")
    shouted = name.upper()
    args: list[tuple[str, ...]] = [(f"--{one}", "1") for one in (name, dashed, shouted, f"model.{name}", f"x.{dashed}")]
    texts = f"{name}: 1", f"trainer: {{{name}: 1}}", f"training_arguments: {{{name}: [1]}}", f"{dashed}: true"
    return [*args, (f"--{name}=1",), (f"--{name}",), *(("--config", text) for text in texts)]


@pytest.mark.parametrize("name", COMMON)
def test_the_common_ones_name_ours_however_they_are_written(parser: RunParser, name: str) -> None:
    """How one is written has nothing to do with which: three ways each, so that each way is tried of several."""
    for args in _spellings(name)[[*COMMON].index(name) % 4 :: 4]:
        error = _error(parser, *args)
        assert error.startswith("unknown option '")
        assert f"; here it is '{COMMON[name]}'" in error


@pytest.mark.parametrize("name", OURS)
def test_those_that_are_called_alike_name_the_section(parser: RunParser, name: str) -> None:
    for spelling in (name, name.replace("_", "-")):
        assert _error(parser, f"--{spelling}", "1") == f"unknown option '{spelling}'; did you mean '{OURS[name]}'?"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("load_in_4bit", "a base is always trained in 4-bit NF4 with double quantisation: leave it out"),
        ("nf4", "a base is always trained in 4-bit NF4 with double quantisation: leave it out"),
        ("group_by_length", "rows of like length always stand together: leave it out"),
        ("resume_from_checkpoint", "the same command, given again, resumes: leave it out"),
        ("push_to_hub", "python main.py push sends an adapter to the hub"),
        ("modules_to_save", "only LoRA is learned, and the base stays as it is: leave it out"),
        ("hf_token", "HF_TOKEN in the environment is the token for the hub: leave it out"),
        ("neftune_alpha", "no noise is put on embeddings: leave it out"),
        ("cache_dir", "HF_HOME in the environment says where downloads are kept: leave it out"),
        ("shuffle", "rows are in another order each epoch, drawn by seed_everything: leave it out"),
        ("streaming", "rows are encoded once, and read from the disk: leave it out"),
        ("adam_beta1", "AdamW's betas and epsilon are PyTorch's: leave it out"),
        ("rank_pattern", "all layers of model.target_modules have the same rank: leave it out"),
    ],
)
def test_what_needs_no_option_says_how_it_is(parser: RunParser, name: str, expected: str) -> None:
    assert _error(parser, f"--{name}", "true") == f"unknown option '{name}'; {expected}"


TRL = (
    "activation_offloading assistant_only_loss chat_template_path completion_only_loss dataset_num_proc "
    "dataset_text_field eos_token eval_packing loss_type pad_to_multiple_of pad_token packing_strategy "
    "padding_free shuffle_dataset truncation_mode attn_implementation bnb_4bit_quant_type dtype load_in_4bit "
    "lora_alpha lora_dropout lora_modules_to_save lora_r lora_target_modules lora_task_type model_name_or_path "
    "model_revision trust_remote_code use_bnb_nested_quant use_dora use_peft use_rslora dataset_config "
    "dataset_name dataset_streaming dataset_test_split dataset_train_split"
)
AXOLOTL = (
    "adapter base_model bf16 chat_template chat_template_jinja cosine_min_lr_ratio dataset_prepared_path "
    "dataset_processes datasets ddp_timeout deepspeed early_stopping_patience eot_tokens eval_sample_packing "
    "evals_per_epoch field_messages flash_attention fsdp_config gradient_accumulation_steps lora_mlp_kernel "
    "lora_model_dir lora_target_linear loraplus_lr_ratio message_property_mappings micro_batch_size "
    "mlflow_tracking_uri neftune_noise_alpha num_epochs optimizer pad_to_sequence_len peft_layers_to_transform "
    "relora_steps rl roles_to_train sample_packing saves_per_epoch sequence_len special_tokens tf32 "
    "train_on_inputs val_set_size wandb_entity wandb_project warmup_steps"
)
LLAMA_FACTORY = (
    "adapter_name_or_path cutoff_len dataset dataset_dir enable_liger_kernel enable_thinking export_dir "
    "finetuning_type flash_attn freeze_trainable_layers galore_rank interleave_probs lora_rank lora_target "
    "mask_history mix_strategy neat_packing overwrite_cache overwrite_output_dir pissa_init plot_loss "
    "pref_beta preprocessing_num_workers quantization_bit quantization_method rope_scaling shift_attn stage "
    "swanlab_project template use_unsloth vllm_maxlen"
)
LITGPT = (
    "checkpoint_dir epochs final_validation global_batch_size initial_validation interval log_interval "
    "logger_name lora_head lora_projection lr_warmup_fraction lr_warmup_steps mask_prompt max_iters max_norm "
    "max_seq_length micro_batch_size min_lr num_nodes out_dir prompt_style quantize save_interval "
    "tie_embeddings val_split_fraction"
)


ANY = (
    "access_token config_file debug dry_run dryrun force hf_token instruction_template log_level plot_loss pretrained "
    "quiet response_template threads token use_auth_token v verbose version yes"
)
"""Names of no program in particular, and of any."""


@pytest.mark.parametrize("names", [TRL, AXOLOTL, LLAMA_FACTORY, LITGPT, ANY])
def test_what_other_programs_call_their_options_is_known(parser: RunParser, names: str) -> None:
    ours = [*parser.types()]
    last = {name.rpartition(".")[2] for name in ours}
    assert [name for name in names.split() if here(name, ours) is None and name not in last] == []


def test_a_name_that_ends_in_a_line_stands_for_all_that_begin_so(parser: RunParser) -> None:
    ours = [*parser.types()]
    assert here("wandb_log_model", ours) == "here it is 'trainer.logger', beside TensorBoard and metrics.jsonl"
    assert (here("wandbx", ours), here("fsdpx", ours)) == (None, None)


def test_every_answer_is_true(parser: RunParser) -> None:
    """All options that it names are there, in fit's parser or in a tool's, and no name is one of ours."""
    ours, seen = {*parser.types()}, set[str]()
    for name, answer in answers("fit").items():
        assert name not in ours and re.fullmatch(r"[a-z0-9_]+", name)
        named = {answer.partition(",")[0]} if " " not in answer.partition(",")[0] else set()
        named |= {*re.findall(r"\b(?:model|data|trainer|samples)\.\w+", answer)} | {*re.findall(r"--(\w+)", answer)}
        assert named <= ours, name
        assert named or ": leave it out" in answer or "python main.py" in answer
        assert here(name, ours)
        if answer not in seen and name not in ("model", "data"):  # the parser takes its time
            assert here(name, ours) in _error(parser, f"--{name}", "1")
        seen.add(answer)


@pytest.mark.slow
def test_the_parser_gives_each_name_its_answer(parser: RunParser) -> None:
    ours = {*parser.types()}
    for name in answers("fit").keys() - {"model", "data"}:
        assert (here(name, ours) or name) in _error(parser, f"--{name}", "1")


def test_no_tools_answer_is_of_nothing() -> None:
    tools = {verb: getattr(importlib.import_module(f"lit_qlora.tools.{verb}"), verb) for verb in cli.TOOLS}
    options = {verb: {*inspect.signature(tool).parameters} for verb, tool in tools.items()}
    for names in (options["chat"], options["predict"]):
        names |= {*inspect.signature(Sampling).parameters}
    for name, answer in answers("tools").items():
        expected = answer if " " in answer else f"here it is {answer!r}"
        assert any(here(name, names) == expected and name not in names for names in options.values())


def test_every_verb_elsewhere_is_one_here() -> None:
    verbs = {*cli.FIT_AND_KIN, *cli.TOOLS, "doctor"}
    assert {re.match(r"\w+", answer)[0] for answer in answers("verbs").values()} <= verbs  # type: ignore[index]
    assert not verbs & answers("verbs").keys()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["chat", "--max_tokens", "3"], "unknown option 'max_tokens'; here it is 'max_new_tokens'"),
        (["chat", "--model-name-or-path", "x"], "unknown option 'model-name-or-path'; here it is 'base'"),
        (["merge", "--output-dir", "x"], "unknown option 'output-dir'; here it is 'output'"),
        (["validate", "--ckpt-path", "x"], "unknown option 'ckpt-path'; did you mean 'ckpt_path'?"),
        (["fit", "--ckpt_path", "x"], "unknown option 'ckpt_path'; the same command, given again, resumes: leave it"),
        (["fit", "--model", "a/b"], "model: is no option but a section of them, got 'a/b'; here it is 'model.base'"),
        (["fit", "--data", "x.jsonl"], "data: is no option but a section of them, got 'x.jsonl'; here it is 'data.so"),
        (["fit", "--trainer", "3"], "trainer: is no option but a section of them, got '3'; the accepted ones are list"),
        (["fit", "--data.seed", "3"], "data.seed: can't be given, it is always seed_everything; set that one"),
        (["fit", "--data.tokenizer", "x"], "data.tokenizer: can't be given, it is always model.base; set that one"),
        (["fit", "--config", "a.yaml"], "unknown option 'lora_r'; here it is 'model.rank'"),
        (["fit", "--config", "b.yaml"], "unknown option 'training_arguments.num-epochs'; here it is 'trainer.max_ep"),
        (["fit", "--config", "c.yaml"], "unknown option 'trainer.max_grad_norm'; here it is 'trainer.gradient_clip_v"),
        (["plan", "--gpus", "T4"], "unknown option 'gpus'; did you mean 'gpu'?"),
        (["fit", "--gpus", "1"], "unknown option 'gpus'; here it is 'trainer.devices', [0] for the first"),
        (["plan", "--nb_epochs", "2"], "unknown option 'nb_epochs'; here it is 'trainer.max_epochs'"),
        (["plan", "--max_epoch", "2"], "unknown option 'max_epoch'; did you mean 'trainer.max_epochs'?"),
        (["fit", "--accumulation_step", "2"], "unknown option 'accumulation_step'; here it is 'trainer.accumulate_g"),
        (["chat", "--max_new_token", "3"], "unknown option 'max_new_token'; did you mean 'max_new_tokens'?"),
        (["predict", "--prompts_file", "x"], "unknown option 'prompts_file'; here it is 'prompts'"),
        (["fit", "--colour", "red"], "unknown option 'colour'; the accepted ones are listed by --help"),
        (["plan", "--per-device-train-batch-size", "8"], "unknown option 'per-device-train-batch-size'; here it is 'd"),
        (
            ["fit", "--model.target_modules", "q_proj", "v_proj"],
            "unknown option 'v_proj'; names in model.target_modules are written with commas: q_proj,v_proj",
        ),
    ],
)
def test_on_the_command_line(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").write_text("seed_everything: 1\n")
    (tmp_path / "a.yaml").write_text("lora_r: 8\n")
    (tmp_path / "b.yaml").write_text("training_arguments:\n  num-epochs: 3\n")
    (tmp_path / "c.yaml").write_text("trainer:\n  max_grad_norm: 0.3\n")
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1


# Names of linear layers


@pytest.mark.parametrize(
    "written",
    ["q_proj,v_proj", "q_proj, v_proj", "q_proj v_proj", "[q_proj,v_proj]", "[q_proj, v_proj]", '["q_proj","v_proj"]',
     "['q_proj', 'v_proj']", " q_proj ,v_proj, "],
)  # fmt: skip
def test_names_in_one_text(parser: RunParser, written: str) -> None:
    for args in (("--model.target_modules", written), ("--config", f"model:\n  target_modules: {written!r}\n")):
        assert split_names(parser.parse_args([*args]).model.target_modules) == ["q_proj", "v_proj"]


def test_names_that_need_no_splitting_stay_as_they_are() -> None:
    for names in ("all-linear", "q_proj", ["q_proj", "v_proj"]):
        assert split_names(names) == names
    assert split_names(["all-linear"]) == "all-linear"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("q_prj", "q_proj"), ("qproj", "q_proj"), ("gate", "gate_proj"), ("all", "all-linear"), ("downproj", "down_proj"),
     ("all_linear", "all-linear"), ("model.layers.0.self_attn.k_proj", "k_proj"), ("O_PROJ", None)],
)  # fmt: skip
def test_a_name_that_there_is_not(name: str, nearest: str | None, expect_error: ExpectError) -> None:
    known = "all-linear, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    error = expect_error(
        lambda: check_lora(find_base("demo"), 4, [name]), repr(name), known, option="model.target_modules"
    )
    assert ("did you mean" in str(error)) == (nearest is not None) and repr(nearest or name) in str(error)


def test_all_linear_beside_a_name() -> None:
    with pytest.raises(UserError, match="all-linear stands for every name; "):
        check_lora(find_base("demo"), 4, ["all-linear", "q_proj"])
