"""Owns the names of other programs' options here: Hugging Face's, TRL's, peft's, Axolotl's and similar.

A table of words; knows no parser.
"""

from collections.abc import Collection, Mapping

from lit_qlora.place import COMMAND


def _by_name(names: Mapping[str, str]) -> dict[str, str]:
    return {name: option for option, known in names.items() for name in known.split()}


HERE = _by_name(
    {
        "model.base": (
            "base_model base_model_name_or_path model model_id model_name model_name_or_path model_path "
            "pretrained_model_name_or_path"
        ),
        "model.base, or --run for what is written": "checkpoint_dir",
        "the tokenizer is that of model.base": (
            "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_type add_bos_token add_eos_token "
            "bos_token eos_token pad_token unk_token"
        ),
        "the config.json of model.base tells: leave it out": "model_type",
        "code that comes with model.base is never run: leave it out": "trust_remote_code",
        "trainer.devices": "num_gpus n_gpu n_gpus nproc_per_node num_processes",
        "trainer.num_nodes": "num_nodes nnodes num_machines",
        "trainer.devices says how many devices learn, and model.shard whether they share the base: leave it out": (
            "device_map deepspeed fsdp fsdp_config ddp local_rank strategy"
        ),
        "a base is always trained in 4-bit NF4 with double quantisation: leave it out": (
            "load_in_4bit load_in_8bit use_4bit quantize quantization quantization_bit quantization_config "
            "quantization_method bnb_4bit_compute_dtype quant_type bnb_4bit_quant_type bnb_4bit_use_double_quant "
            "use_double_quant use_nested_quant double_quant double_quantization bits"
        ),
        "model.rank": "r lora_r lora_rank",
        "model.alpha": "lora_alpha",
        "model.dropout": "lora_dropout",
        "model.target_modules": (
            "lora_target lora_target_modules lora_target_linear lora_modules lora_query lora_key lora_value "
            "lora_projection lora_mlp"
        ),
        "model.rslora": "use_rslora lora_use_rslora peft_use_rslora",
        "model.dora": "use_dora lora_use_dora peft_use_dora",
        "model.adapter": "adapter_name_or_path lora_model_dir lora_weights peft_model peft_model_id",
        "LoRA is what is trained: leave it out": (
            "use_lora use_peft use_qlora finetuning_type lora_task_type peft_type task_type"
        ),
        "LoRA has no biases here: leave it out": "lora_bias bias",
        "names in model.target_modules are written with commas: q_proj,v_proj": (
            "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
        ),
        "data.source": (
            "data data_dir data_file data_files data_path dataset dataset_dir dataset_name dataset_path datasets "
            "json_path path train_data train_dataset train_file train_path"
        ),
        "data.validation_source": "eval_dataset eval_file val_file valid_file validation_file test_datasets",
        "data.test_source": "test_file",
        "data.validation_share": "val_set_size val_size val_split_fraction test_size eval_split_ratio validation_split",
        "data.validation_share, of 1": "validation_split_percentage",
        "data.max_length": (
            "max_seq_length max_seq_len max_sequence_length model_max_length seq_length seq_len sequence_len "
            "sequence_length cutoff_len block_size source_max_len target_max_len max_prompt_length"
        ),
        "data.batch_size": (
            "per_device_train_batch_size per_gpu_train_batch_size per_device_eval_batch_size train_batch_size "
            "eval_batch_size micro_batch_size"
        ),
        f"data.batch_size, and {COMMAND} plan shows what fits": "auto_find_batch_size",
        "trainer.accumulate_grad_batches, which with data.batch_size makes a step": (
            "global_batch_size gradient_accumulation gradient_accumulation_iters gradient_accumulation_steps "
            "grad_accum grad_accum_steps"
        ),
        "data.packing": "sample_packing neat_packing eval_packing eval_sample_packing",
        "a micro-batch is padded to its longest row: leave it out": "pad_to_sequence_len",
        "rows of like length always stand together: leave it out": "group_by_length length_column_name",
        "data.num_workers": "dataloader_num_workers dataset_num_proc dataset_processes preprocessing_num_workers",
        "data.template": "chat_template prompt_template prompt_style",
        "data.form": "dataset_format dataset_text_field text_column prompt_type",
        "data.system": "default_system system_prompt",
        "data.train_on": (
            "train_on_inputs train_on_prompt train_on_source mask_prompt completion_only_loss assistant_only_loss"
        ),
        "trainer.limit_train_batches, in micro-batches of an epoch": "max_samples max_train_samples",
        "trainer.limit_train_batches": "overfit_batches",
        "trainer.limit_val_batches, in micro-batches": "max_eval_samples",
        "model.learning_rate": "lr base_learning_rate max_lr",
        "trainer.max_epochs": "epoch epochs num_epoch num_epochs num_train_epochs n_epochs",
        "trainer.max_steps": "iterations num_steps steps train_steps max_iters fast_dev_run",
        "trainer.gradient_clip_val": "gradient_clipping grad_clip max_grad_norm max_norm",
        "model.optimizer": "optim",
        "model.schedule": "lr_scheduler lr_scheduler_type scheduler",
        "model.warmup_ratio, a share of the steps": "warmup warmup_iters warmup_steps lr_warmup_steps",
        "model.weight_decay": "wd",
        "seed_everything": "seed data_seed random_state",
        "model.checkpointing": (
            "gradient_checkpointing gradient_checkpointing_kwargs use_gradient_checkpointing activation_checkpointing"
        ),
        "model.attention": (
            "attn_implementation flash_attention flash_attention_2 flash_attn use_flash_attention "
            "use_flash_attention_2 use_flash_attn"
        ),
        "model.compile": "torch_compile use_compile",
        "trainer.precision, and auto chooses by the card": (
            "fp16 bf16 tf32 half amp dtype torch_dtype compute_dtype mixed_precision"
        ),
        "trainer.accelerator": "device cpu use_cpu no_cuda",
        "trainer.devices, [0] for the first": "gpu gpus",
        "run": (
            "output output_dir out_dir save_dir logging_dir default_root_dir name run_name experiment_name project_name"
        ),
        "nothing is overwritten: give --run a new name": "overwrite_output_dir",
        "the same command, given again, resumes: leave it out": (
            "resume resume_from_checkpoint auto_resume_from_checkpoints ckpt ckpt_path"
        ),
        "save_every_steps, beside save_every_minutes": "save_interval save_steps save_strategy saves_per_epoch",
        "keep_checkpoints": "save_total_limit",
        "trainer.val_check_interval, in micro-batches or as a share of an epoch": (
            "eval_interval eval_steps eval_strategy evals_per_epoch evaluation_strategy check_val_every_n_epoch"
        ),
        "trainer.log_every_n_steps": "log_interval log_steps logging_interval logging_steps",
        "early_stopping": "early_stopping_patience patience",
        "the adapter of a run is the best so far: leave it out": "load_best_model_at_end",
        "trainer.logger, beside TensorBoard and metrics.jsonl": "report_to wandb wandb_project use_wandb",
        "trainer.enable_progress_bar": "disable_tqdm",
        f"{COMMAND} push sends an adapter to the hub": "push_to_hub hub_model_id",
        "fit trains, validate and test score: leave it out": "do_train do_eval do_predict",
        "answers of conversations are what is learned: leave it out": "stage",
        "samples.max_new_tokens": "max_tokens eval_max_new_tokens",
        "samples.count": "num_samples",
    }
)
"""By a name, in lower case with underscores and without its section: the option, with a remark after a comma; or a
sentence."""

TOOLS = _by_name(
    {
        "adapter": "adapter_name_or_path adapter_path lora_model_dir peft_model",
        "base": "base_model model model_id model_name model_name_or_path",
        "max_new_tokens": "max_length max_tokens n_predict num_predict",
        "temperature": "temp",
        "prompts": "input input_file prompts_file",
        "prompt": "question text",
        "system": "system_prompt",
        "output": "output_dir output_file outfile out save_dir",
        "run": "run_dir checkpoint",
        "dtype": "torch_dtype outtype",
        "to": "repo_id repo hub_model_id",
        "web": "gradio",
        "source": "data dataset",
        "max_length": "seq_len",
    }
)
"""The same for the verbs that train nothing."""


def here(name: str, options: Collection[str]) -> str | None:
    """The remedy for the option ``name`` of another program, by the accepted options; None if unknown."""
    last = name.rpartition(".")[2].replace("-", "_").lower()
    found = (HERE if "model.base" in options else TOOLS).get(last)
    if found is None:
        return None
    option, comma, remark = found.partition(",")
    if " " in option:
        return found
    return f"here it is {option!r}{comma}{remark}" if option in options else None
