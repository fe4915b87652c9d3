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
            "pretrained_model_name_or_path weights model_path_or_name base_dir model_config checkpoint_path"
        ),
        "model.base, or --run for what is written": "checkpoint_dir",
        "the tokenizer is that of model.base": (
            "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_type add_bos_token "
            "add_eos_token bos_token eos_token pad_token unk_token tokenizer_config tokenizer_model "
            "tokenizer_use_fast tokenizer_legacy use_fast_tokenizer special_tokens additional_special_tokens "
            "add_tokens add_special_tokens new_special_tokens tokens resize_vocab resize_token_embeddings_to_32x "
            "split_special_tokens tokenizer_ init_special_tokens"
        ),
        "the config.json of model.base tells: leave it out": (
            "model_type rope_scaling shift_attn tie_embeddings tie_word_embeddings type_of_model"
        ),
        "code that comes with model.base is never run: leave it out": "trust_remote_code",
        "trainer.devices": "num_gpus n_gpu n_gpus nproc_per_node num_processes",
        "trainer.num_nodes": "num_nodes nnodes num_machines",
        "trainer.devices says how many devices learn, and model.shard whether they share the base: leave it out": (
            "device_map deepspeed fsdp fsdp_config ddp local_rank strategy ddp_ fsdp_ deepspeed_ zero_stage "
            "tensor_parallel_size tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
            "sequence_parallel sequence_parallel_degree world_size max_memory ray_ accelerator_config "
            "parallelism_config use_ray gpu_memory_limit dp_shard_size dp_replicate_size data_parallel_size "
            "expert_model_parallel_size"
        ),
        "a base is always trained in 4-bit NF4 with double quantisation: leave it out": (
            "load_in_4bit load_in_8bit use_4bit quantize quantization quantization_bit quantization_config "
            "quantization_method bnb_4bit_compute_dtype quant_type bnb_4bit_quant_type bnb_4bit_use_double_quant "
            "use_double_quant use_nested_quant double_quant double_quantization bits bnb_ bnb_4bit_quant_storage "
            "use_bnb_nested_quant gptq fp8 quantization_ load_in_ model_dtype"
        ),
        "model.rank": "r lora_r lora_rank",
        "model.alpha": "lora_alpha",
        "model.dropout": "lora_dropout",
        "model.target_modules": (
            "lora_target lora_target_modules lora_target_linear lora_modules lora_query lora_key lora_value "
            "lora_projection lora_mlp lora_head lora_on_all_modules additional_target"
        ),
        "model.rslora": "use_rslora lora_use_rslora peft_use_rslora",
        "model.dora": "use_dora lora_use_dora peft_use_dora",
        "model.adapter": (
            "adapter_name_or_path lora_model_dir lora_weights peft_model peft_model_id lora_path adapter adapter_path "
            "adapter_dir adapter_file resume_adapter_file peft_path lora_checkpoint"
        ),
        "LoRA is what is trained: leave it out": (
            "use_lora use_peft use_qlora finetuning_type lora_task_type peft_type task_type fine_tune_type peft "
            "peft_config train_type tuner tuner_type relora relora_ peft_ lora_fan_in_fan_out fan_in_fan_out oft_ "
            "create_new_adapter"
        ),
        "LoRA has no biases here: leave it out": "lora_bias bias",
        "names in model.target_modules are written with commas: q_proj,v_proj": (
            "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
        ),
        "data.source": (
            "data data_dir data_file data_files data_path dataset dataset_dir dataset_name dataset_path datasets "
            "json_path path train_data train_dataset train_file train_path dataset_id dataset_names "
            "pretraining_dataset dataset_url"
        ),
        "data.validation_source": (
            "eval_dataset eval_file val_file valid_file validation_file test_datasets eval_data val_data valid_data "
            "validation_data validation_dataset val_dataset"
        ),
        "data.test_source": "test_file",
        "data.validation_share": (
            "val_set_size val_size val_split_fraction test_size eval_split_ratio validation_split val_ratio "
            "eval_ratio validation_ratio val_fraction split_dataset_ratio"
        ),
        "data.validation_share, of 1": "validation_split_percentage",
        "data.max_length": (
            "max_seq_length max_seq_len max_sequence_length model_max_length seq_length seq_len sequence_len "
            "sequence_length cutoff_len block_size source_max_len target_max_len max_prompt_length context_length "
            "context_len context_window max_len max_prompt_len max_length_seq max_tokens_per_sample num_ctx n_ctx "
            "ctx_len max_packed_sequence_len eval_sequence_len max_token_length"
        ),
        "data.batch_size": (
            "per_device_train_batch_size per_gpu_train_batch_size per_device_eval_batch_size train_batch_size "
            "eval_batch_size micro_batch_size batch bs bsz train_bs micro_batch micro_bs "
            "micro_batch_size_per_gpu per_device_batch_size val_batch_size train_micro_batch_size_per_gpu"
        ),
        f"data.batch_size, and {COMMAND} plan shows what fits": "auto_find_batch_size",
        "trainer.accumulate_grad_batches, which with data.batch_size makes a step": (
            "global_batch_size gradient_accumulation gradient_accumulation_iters gradient_accumulation_steps "
            "grad_accum grad_accum_steps accum accumulate accumulation accumulation_steps accumulate_steps grad_acc "
            "grad_acc_steps grad_accumulation_steps gradient_accumulate_steps update_freq"
        ),
        "data.packing": (
            "sample_packing neat_packing eval_packing eval_sample_packing pack packed padding_free packing_strategy "
            "batch_flattening multipack_real_batches sample_packing_ use_packing"
        ),
        "data.columns, such as {user: COLUMN, assistant: COLUMN}": (
            "prompt_column response_column input_column output_column instruction_column question_column answer_column "
            "query_column completion_column target_column prompt_field response_field system_column history_column "
            "column_mapping column_names dataset_columns dataset_column_mapping columns field field_ prompt_key "
            "response_key prompt_feature completion_feature input_key output_key input_field output_field"
        ),
        "data.columns, such as {text: COLUMN}": (
            "dataset_text_field text_column text_field text_key text_feature content_column"
        ),
        "data.columns, such as {messages: COLUMN}": (
            "messages_column messages_field message_field field_messages conversation_column chat_feature chat_column "
            "message_property_mappings message_field_"
        ),
        "data.source, such as {path: owner/name, name: main, split: train}": (
            "split train_split dataset_split dataset_train_split train_dataset_split subset dataset_subset config_name "
            "dataset_config dataset_config_name data_config revision dataset_revision hub_dataset"
        ),
        "data.validation_source, such as owner/name:validation": (
            "eval_split val_split valid_split dataset_test_split eval_dataset_split dataset_eval_split"
        ),
        "data.test_source, such as owner/name:test": "test_split",
        "model.base, a folder with that revision": "model_revision revision_of_model base_model_revision",
        "HF_HOME in the environment says where downloads are kept: leave it out": (
            "cache_dir cache hf_home download_dir hf_cache_dir model_cache_dir datasets_cache_dir"
        ),
        "rows are in another order each epoch, drawn by seed_everything: leave it out": (
            "shuffle shuffle_data shuffle_dataset shuffle_train shuffle_merged_datasets disable_shuffling "
            "shuffle_buffer_size shuffle_seed curriculum_sampling"
        ),
        "rows are encoded once, and read from the disk: leave it out": (
            "streaming dataset_streaming stream buffer_size max_buffer_size overwrite_cache dataset_prepared_path "
            "tokenized_path preprocessing_batch_size dataset_keep_in_memory skip_prepare_dataset"
        ),
        "mix sources in data.source, each with its share: leave it out": (
            "mix_strategy interleave_probs dataset_mixer mixing_ratio interleave"
        ),
        "the first row that can't be used is an error with data.strict: leave it out": "skip_invalid ignore_errors",
        "columns that are not used are named: leave it out": "remove_unused_columns label_names keep_columns",
        "data.max_length, where longer rows are cut": (
            "truncation truncation_mode truncation_side excess_length_strategy truncate"
        ),
        "the loader's one setting is data.num_workers: leave it out": "dataloader_ pin_memory prefetch_factor",
        "texts alone are learned: leave it out": (
            "image_ video_ audio_ media_dir freeze_vision_tower freeze_multi_modal_projector freeze_mm_modules "
            "processor_type"
        ),
        "a turn whose weight is 0 is not learned: leave it out": "mask_history train_on_last_turn",
        "only LoRA is learned, and the base stays as it is: leave it out": (
            "modules_to_save lora_modules_to_save trainable_token_indices embedding_lr embedding_lr_scale freeze_ "
            "freeze_layers unfrozen_parameters num_layers_unfrozen train_embeddings merge_and_unload reinit_weights"
        ),
        "all layers of model.target_modules have the same rank: leave it out": (
            "rank_pattern alpha_pattern lora_rank_pattern lora_alpha_pattern layers_to_transform layers_pattern "
            "peft_layers_to_transform peft_layers_pattern exclude_modules lora_layers num_layers lora_num_layers "
            "layer_replication"
        ),
        "LoRA begins as in its paper, A drawn by seed_everything and B zero: leave it out": (
            "init_lora_weights peft_init_lora_weights init_lora pissa_ use_pissa loftq loftq_ eva_config corda_config "
            "lora_ga_config"
        ),
        "all of LoRA learns at model.learning_rate: leave it out": (
            "loraplus_ loraplus_lr_ratio use_loraplus lora_plus lora_lr lr_groups"
        ),
        "no noise is put on embeddings: leave it out": "neftune neftune_ use_neftune noisy_embedding_alpha",
        "the loss is cross-entropy over what is learned: leave it out": (
            "label_smoothing label_smoothing_factor loss loss_fn loss_type use_dft_loss moe_aux_loss_coef "
            "average_tokens_across_devices ignore_pad_token_for_loss"
        ),
        "model.loss_rows, how many rows of logits exist at a time": (
            "chunked_cross_entropy chunked_cross_entropy_num_chunks chunked_ce use_liger_loss fused_cross_entropy"
        ),
        "model.own_layers, which saves time and memory": (
            "use_liger use_liger_kernel enable_liger_kernel liger_ liger_kernel_config use_unsloth unsloth use_kernels "
            "lora_mlp_kernel lora_qkv_kernel lora_o_kernel"
        ),
        "model.offload": (
            "activation_offloading offload_activations offload_folder cpu_offload layer_offloading activation_offload"
        ),
        "AdamW's betas and epsilon are PyTorch's: leave it out": (
            "adam_beta1 adam_beta2 adam_epsilon adam_eps betas beta1 beta2 eps adam_betas adam_"
        ),
        "a schedule ends at 0: leave it out": "min_lr lr_min end_lr final_lr min_learning_rate",
        "trainer.deterministic": "full_determinism use_deterministic_algorithms",
        "a base is loaded piece by piece: leave it out": "low_cpu_mem_usage cpu_ram_efficient_loading",
        "nothing of training is cached: leave it out": "use_cache use_kv_cache",
        "torch's memory is looked after: leave it out": (
            "torch_empty_cache_steps gc_steps empty_cache skip_memory_metrics"
        ),
        "tokens and their speed are always recorded: leave it out": (
            "include_num_input_tokens_seen include_tokens_per_second include_tkps include_effective_tokens_per_second "
            "plot_loss compute_accuracy"
        ),
        "samples.temperature, and above 0 samples are drawn": "do_sample generation_do_sample generation_temperature",
        "samples.top_p": "generation_top_p",
        "samples.top_k": "generation_top_k",
        "samples are written token by token: leave it out": "num_beams num_beam eval_num_beams length_penalty",
        "a template that can leave thoughts out does: leave it out": (
            "enable_thinking thinking reasoning preserve_thinking split_thinking chat_template_kwargs"
        ),
        "torchrun and srun set it: leave it out": (
            "master_addr master_port node_rank machine_rank main_process_port rdzv_"
        ),
        f"{COMMAND} merge works an adapter into its base": (
            "merge_lora merge_adapter merge_adapters save_merged export_dir export_"
        ),
        f"{COMMAND} merge writes a folder that vLLM takes": "vllm use_vllm vllm_ sglang_ infer_backend",
        f"{COMMAND} evaluate scores an adapter": (
            "n_shot num_fewshot task tasks benchmark do_bench_eval eval_tasks lang"
        ),
        "a micro-batch is padded to its longest row: leave it out": (
            "pad_to_sequence_len pad_to_multiple_of pad_to_max_length padding padding_side pad_to_sequence_length"
        ),
        "rows of like length always stand together: leave it out": "group_by_length length_column_name",
        "data.num_workers": (
            "dataloader_num_workers dataset_num_proc dataset_processes preprocessing_num_workers workers num_proc"
        ),
        "data.template": (
            "chat_template prompt_template prompt_style chat_template_path chat_template_jinja chat_template_name "
            "conversation conv_template template template_name eot_tokens prompt_format system_format tool_format "
            "chat_format conversation_template"
        ),
        "data.form": "dataset_format prompt_type type data_format ds_type",
        "data.system": "default_system system_prompt default_system_message system_message",
        "data.train_on": (
            "train_on_inputs train_on_prompt train_on_source mask_prompt completion_only_loss assistant_only_loss "
            "train_on_responses_only train_on_completions train_on_completions_only train_on_answers train_on_eos "
            "train_on_eot roles_to_train only_train_on_answers ignore_index loss_on_prompt"
        ),
        "trainer.limit_train_batches, in micro-batches of an epoch": "max_samples max_train_samples",
        "trainer.limit_train_batches": "overfit_batches",
        "trainer.limit_val_batches, in micro-batches": "max_eval_samples val_batches eval_iters limit_eval",
        "model.learning_rate": "lr base_learning_rate max_lr learn_rate learningrate peak_lr init_lr initial_lr",
        "trainer.max_epochs": "epoch epochs num_epoch num_epochs num_train_epochs n_epochs",
        "trainer.max_steps": (
            "iterations num_steps steps train_steps max_iters fast_dev_run iters max_train_steps num_iterations "
            "num_iters num_training_steps total_steps n_steps"
        ),
        "trainer.gradient_clip_val": "gradient_clipping grad_clip max_grad_norm max_norm",
        "model.optimizer": (
            "optim optimizer_name optimizer_type optim_ galore_ use_galore qgalore_ apollo_ use_apollo badam_ "
            "use_badam use_adam_mini use_muon muon lisa_ dion_"
        ),
        "model.schedule": (
            "lr_scheduler lr_scheduler_type scheduler cosine cosine_ lr_decay lr_decay_style lr_schedule "
            "scheduler_type lr_quadratic_warmup lr_scheduler_kwargs lr_scheduler_"
        ),
        "model.warmup_ratio, a share of the steps": (
            "warmup warmup_iters warmup_steps lr_warmup_steps lr_warmup_fraction lr_warmup_ratio warmup_proportion "
            "warmup_fraction warm_up num_warmup_steps"
        ),
        "model.weight_decay": "wd",
        "seed_everything": "seed data_seed random_state random_seed rng_seed manual_seed",
        "model.checkpointing": (
            "gradient_checkpointing gradient_checkpointing_kwargs use_gradient_checkpointing activation_checkpointing "
            "recompute recompute_granularity selective_checkpointing use_reentrant "
            "gradient_checkpointing_use_reentrant use_gradient_checkpointing_unsloth use_unsloth_gc "
            "disable_gradient_checkpointing activation_checkpointing_kwargs grad_checkpoint grad_checkpointing"
        ),
        "model.attention": (
            "attn_implementation flash_attention flash_attention_2 flash_attn use_flash_attention "
            "use_flash_attention_2 use_flash_attn attention attn attn_impl flash_ sdp_attention sdpa_attention "
            "xformers xformers_attention flex_attention eager_attention sage_attention s2_attention"
        ),
        "model.compile": "torch_compile use_compile torch_compile_ compile_model",
        "trainer.precision, and auto chooses by the card": (
            "fp16 bf16 tf32 half amp dtype torch_dtype compute_dtype mixed_precision bfloat16 float16 float32 fp32 "
            "pure_bf16 bf16_full_eval fp16_full_eval infer_dtype"
        ),
        "trainer.accelerator": "device cpu use_cpu no_cuda cuda use_cuda use_gpu mps use_mps",
        "trainer.devices, [0] for the first": (
            "gpu gpus cuda_visible_devices visible_devices gpu_ids device_ids gpu_id"
        ),
        "run": (
            "output output_dir out_dir save_dir logging_dir default_root_dir name run_name experiment_name "
            "project_name outdir save_path log_dir logdir tensorboard_dir adapter_output_dir "
            "work_dir exp_name"
        ),
        "nothing is overwritten: give --run a new name": "overwrite_output_dir overwrite overwrite_output",
        "the same command, given again, resumes: leave it out": (
            "resume resume_from_checkpoint auto_resume_from_checkpoints ckpt ckpt_path resume_from resume_path "
            "resume_training ignore_data_skip continue_training"
        ),
        "save_every_steps, beside save_every_minutes": (
            "save_interval save_steps save_strategy saves_per_epoch save_every checkpointing_steps checkpoint_every "
            "save_freq checkpoint_interval saving_steps"
        ),
        "keep_checkpoints": "save_total_limit max_checkpoints keep_last_n_checkpoints",
        "trainer.val_check_interval, in micro-batches or as a share of an epoch": (
            "eval_interval eval_steps eval_strategy evals_per_epoch evaluation_strategy check_val_every_n_epoch "
            "interval eval_every eval_freq steps_per_eval val_interval validation_interval eval_on_start eval_delay "
            "initial_validation final_validation validation_steps val_steps"
        ),
        "trainer.log_every_n_steps": (
            "log_interval log_steps logging_interval logging_steps log_every log_freq steps_per_report logging_"
        ),
        "early_stopping": (
            "early_stopping_patience patience early_stop early_stopping_steps early_stopping_threshold "
            "use_early_stopping"
        ),
        "the adapter of a run is the best so far: leave it out": (
            "load_best_model_at_end metric_for_best_model greater_is_better save_best save_only_model save_best_model"
        ),
        "trainer.logger, beside TensorBoard and metrics.jsonl": (
            "report_to wandb wandb_project use_wandb logger logger_name loggers with_tracking use_tensorboard "
            "tensorboard wandb_ swanlab_ use_swanlab mlflow_ use_mlflow comet_ use_comet trackio_ use_trackio "
            "neptune_ clearml_ project"
        ),
        "trainer.callbacks, with one of your own": "profiler profiler_ enable_torch_profiler",
        "trainer.limit_test_batches": "test_batches test_iters",
        "weights are always written as safetensors: leave it out": "save_safetensors safe_serialization",
        f"{COMMAND} chat talks with what was trained": "gradio_ web_ui",
        "trainer.enable_progress_bar": "disable_tqdm",
        f"{COMMAND} push sends an adapter to the hub": (
            "push_to_hub hub_model_id hub_ push_to_hub_ upload_to_hub repo_id"
        ),
        "fit trains, validate and test score: leave it out": "do_train do_eval do_predict",
        "answers of conversations are what is learned: leave it out": (
            "stage rl trl rlhf dpo kto orpo grpo ppo reward_model dpo_ kto_ ppo_ grpo_ orpo_ simpo_ cpo_ pref_ rl_ "
            "trl_ reward_ ref_model ref_model_"
        ),
        "samples.max_new_tokens": (
            "max_tokens eval_max_new_tokens generation_max_new_tokens generation_max_length gen_max_tokens"
        ),
        "samples.count": "num_samples",
    }
)
"""By a name, in lower case with underscores and without its section: the option, with a remark after a comma; or a
sentence. A name that ends in ``_`` stands for all that begin with it and have no line of their own."""

TOOLS = _by_name(
    {
        "adapter": "adapter_name_or_path adapter_path adapter_dir lora lora_path lora_model_dir peft_model",
        "base": "base_model base_model_name_or_path model model_id model_name model_name_or_path model_path",
        "max_new_tokens": "max_length max_tokens n_predict num_predict max_gen_len max_gen_toks max_output_tokens",
        "temperature": "temp do_sample",
        "repetition_penalty": "repeat_penalty rep_penalty",
        "stop": "stop_sequences stop_strings stop_words stop_token",
        "batch_size": "batch bs per_device_eval_batch_size eval_batch_size",
        "seed": "random_seed seed_everything",
        "shots": "n_shot num_fewshot fewshot",
        "port": "server_port",
        "prompts": "input input_file input_path prompt_file prompts_file questions",
        "prompt": "question text",
        "system": "system_prompt",
        "output": "output_dir output_file output_path outfile out save_dir save_path export_dir",
        "run": "run_dir checkpoint",
        "dtype": "torch_dtype outtype",
        "to": "repo_id repo hub_model_id",
        "web": "gradio",
        "source": "data dataset",
        "max_length": "seq_len max_seq_length max_seq_len cutoff_len",
        "the base is loaded as the adapter was trained on it: leave it out": (
            "load_in_4bit load_in_8bit device_map quantize quantization trust_remote_code"
        ),
    }
)
"""The same for the verbs that train nothing."""


def here(name: str, options: Collection[str]) -> str | None:
    """The remedy for the option ``name`` of another program, by the accepted options; None if unknown."""
    last = name.rpartition(".")[2].replace("-", "_").lower()
    table = HERE if "model.base" in options else TOOLS
    found = table.get(last) or next((table[one] for one in table if one[-1] == "_" and last.startswith(one)), None)
    if found is None:
        return None
    option, comma, remark = found.partition(",")
    if " " in option:
        return found
    return f"here it is {option!r}{comma}{remark}" if option in options else None
