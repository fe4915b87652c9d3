"""One peer of the comparison, in a process of its own: `python benchmarks/peers.py NAME SPEC`. See compare.py.

Prints one line of JSON last: tokens per second, padding, peak memory, the loss of the same rows before training.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

SCORED_ROWS = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock:
    """A count of whole optimizer steps from the warm-up on, which says when enough has been seen.

    Args:
        spec: What to measure, as compare.py writes it.
    """

    def __init__(self, spec: dict) -> None:
        self.spec = spec
        self.steps = self.tokens = self.places = 0
        self.batches_per_step = 1
        self.timed_steps = 0
        self.since: float | None = None
        self.seconds = 0.0
        self.start_seconds = 0.0
        self.pending: list[tuple[int, int]] = []
        self.kernels: Any = None
        self.kernel_us: dict[str, float] = {}

    def batch(self, tokens: int, places: int) -> None:
        """Count a micro-batch, of which ``tokens`` of the ``places`` hold tokens and the rest padding."""
        self.pending.append((tokens, places))

    def step(self) -> bool:
        """Count an optimizer step; return True if it was the last."""
        _synchronize()
        now = time.monotonic()
        self.steps += 1
        if self.steps == self.spec["warm_up"]:
            self.start_seconds = self.start_seconds or now - STARTED
            if self.spec["kernels"]:
                self.kernels = _kernel_times().KernelTimes()
                self.kernels.start()
            self.since = time.monotonic()
        elif self.since is not None:
            self.tokens += sum(tokens for tokens, _ in self.pending)
            self.places += sum(places for _, places in self.pending)
            self.timed_steps += 1
            self.seconds = now - self.since
        self.pending.clear()
        is_last = self.seconds >= self.spec["seconds"] and self.tokens >= self.spec["pass_tokens"]
        if is_last and self.kernels:  # before the rows are scored again, which is no part of a step
            self.kernel_us = self.kernels.stop()
            self.kernels = None
        return is_last

    def report(self, loss: float, loss_after: float, precision: str) -> None:
        """Print this process's figures, as its last line.

        Args:
            loss: Loss of the scored rows before training.
            loss_after: The same at its end.
            precision: Precision that was trained in, in the peer's own words.
        """
        profiled = {}
        if self.kernel_us:
            kernel_times = _kernel_times()
            profiled = kernel_times.summed(self.kernel_us, self.tokens)
            tflops, gb_per_s = kernel_times.sustained()
            profiled |= {"tflops": tflops, "gb_per_s": gb_per_s}
            profiled["t4_tokens_per_second"] = kernel_times.projected(profiled["us_per_token"], tflops, gb_per_s)
        found = profiled | {
            "tokens_per_second": self.tokens / self.seconds,
            "padding_share": 1 - self.tokens / self.places,
            "steps": self.timed_steps,
            "start_seconds": self.start_seconds,
            "peak_gib": _peak_gib(),
            "loss": loss,
            "loss_after": loss_after,
            "precision": precision,
        }
        print(json.dumps(found), flush=True)


def _kernel_times() -> Any:
    import kernel_times

    return kernel_times


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_gib() -> float:
    """Reserved on a GPU, else the process's highest on the host."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1024**3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _rows(spec: dict) -> list[dict]:
    return [json.loads(line) for line in Path(spec["ids"]).read_text(encoding="utf-8").splitlines()]


def lit_qlora(spec: dict, clock: Clock, extra: tuple[str, ...] = ()) -> None:
    """Train through the command line, as a user would; a callback holds the clock.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
        extra: Further options of ``fit``.
    """
    import own_timer

    from lit_qlora.cli import main

    own_timer.clock, own_timer.rows = clock, _rows(spec)[:SCORED_ROWS]
    args = ["fit", "--model.base", spec["base"], "--model.rank", str(spec["rank"]), "--model.schedule", "constant"]
    args += ["--model.warmup_ratio", "0", "--data.source", spec["chats"], "--data.validation_source", spec["held_out"]]
    args += ["--data.max_length", str(spec["max_length"]), "--data.batch_size", str(spec["batch_size"])]
    args += ["--run", f"ours-{len(extra)}", "--trainer.max_epochs", "1000", "--trainer.limit_val_batches", "1"]
    args += ["--trainer.val_check_interval", "100000"]
    args += ["--samples.count", "0", "--save_every_steps", "100000", *extra]
    args += ["--trainer.callbacks", "own_timer.Stopwatch"]
    if spec["kernels"]:  # as a T4 runs a base of 7B
        args += ["--model.cuda_graphs", "false"]
    elif spec["t4"] and "--data.packing" not in extra:  # what auto chooses on a large card; this one has a T4's name
        args += ["--model.cuda_graphs", "true"]
    sys.exit(main(args))  # where it comes back, it ended before it was measured


def lit_qlora_tokens(spec: dict, clock: Clock) -> None:
    """Train as `lit_qlora` does, with as many rows per batch as fit into a full batch's tokens.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    lit_qlora(spec, clock, ("--data.batch_tokens", str(spec["batch_size"] * spec["max_length"] // 2)))


def lit_qlora_packed(spec: dict, clock: Clock) -> None:
    """Train as `lit_qlora_tokens` does, with the rows packed into one, without padding.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    tokens = str(spec["batch_size"] * spec["max_length"] // 2)
    lit_qlora(spec, clock, ("--data.batch_tokens", tokens, "--data.packing", "true"))


def trl_default(spec: dict, clock: Clock, **best: object) -> None:
    """Train with SFTTrainer on a 4-bit base, from the same ids and labels, with its defaults where the work allows.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
        **best: Options of SFTConfig in place of its defaults.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    on_t4 = {"fp16": True, "bf16": False} if spec["t4"] else {}
    more = {"max_length": spec["max_length"], "use_cpu": not torch.cuda.is_available()}
    model, tokenizer = _base(spec)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**_options(spec, "trl") | more | on_t4 | best),
        train_dataset=Dataset.from_list(_rows(spec)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=spec["rank"], lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    _adapters_in_fp32(trainer, spec)
    _measure(trainer, spec, clock)


def trl_grouped(spec: dict, clock: Clock) -> None:
    """Train with SFTTrainer's own quicker options: rows of like length together, no recomputation, Liger on a GPU.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    trl_default(spec, clock, train_sampling_strategy="group_by_length", **_quicker(spec))


def trl_packed(spec: dict, clock: Clock) -> None:
    """Train as `trl_grouped` does, but packed: as many tokens per step as batches by tokens have here, no padding.

    TRL asks for flash attention there and takes any other: its collator gives no mask and its loss no cache, so that
    transformers keeps documents apart by their positions. The loss of the same rows shows it.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    rows = max(1, spec["batch_size"] // 2)
    trl_default(spec, clock, packing=True, packing_strategy="bfd", per_device_train_batch_size=rows, **_quicker(spec))


def _quicker(spec: dict) -> dict[str, object]:
    """Options of transformers' Trainer that save time where they run."""
    import torch

    # A host has the memory, as has a large card.
    found: dict[str, object] = {} if spec["t4"] else {"gradient_checkpointing": False}
    return found | ({"use_liger_kernel": True} if torch.cuda.is_available() and _has("liger_kernel") else {})


def plain(spec: dict, clock: Clock) -> None:
    """Train with transformers' Trainer and peft's `prepare_model_for_kbit_training`, as QLoRA's own script does.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = _base(spec)
    lora = LoraConfig(r=spec["rank"], lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        **_options(spec, "plain"), fp16=bool(spec["t4"]), bf16=not spec["t4"], gradient_checkpointing=True,
        train_sampling_strategy="group_by_length", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(prepare_model_for_kbit_training(model), lora),
        arguments,
        train_dataset=Dataset.from_list(_rows(spec)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    _measure(trainer, spec, clock)


def unsloth(
    spec: dict, clock: Clock, checkpointing: str | bool = "unsloth", accumulation: int = 1, **best: object
) -> None:
    """Train with FastLanguageModel and the SFTTrainer that it puts into TRL; without padding by default.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
        checkpointing: Unsloth's ``use_gradient_checkpointing``: its own kind, True for torch's, False for none.
        accumulation: Number of micro-batches in a step.
        **best: Options of SFTConfig in place of its defaults.

    Raises:
        RuntimeError: TRL was imported first, and Unsloth's trainer is not in it.
    """
    import os

    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    # Before transformers, peft and TRL: imported after TRL it leaves its trainer as it was, and that one pads.
    from unsloth import FastLanguageModel  # isort: skip
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if not SFTTrainer.__name__.startswith("Unsloth"):
        raise RuntimeError("Unsloth did not put its trainer into TRL: something imported TRL before it")
    half = torch.float16 if spec["t4"] else torch.bfloat16
    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["base"], max_seq_length=spec["max_length"], dtype=half, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=spec["rank"],
        lora_alpha=16,
        lora_dropout=0,
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
    )
    more = {"max_length": spec["max_length"], "fp16": bool(spec["t4"]), "bf16": not spec["t4"]}
    clock.batches_per_step = accumulation
    more |= {"gradient_accumulation_steps": accumulation}  # its own default is 2: another number of rows per step
    config = SFTConfig(**_options(spec, "unsloth") | more | best)
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(_rows(spec)), processing_class=tokenizer)
    _adapters_in_fp32(trainer, spec)
    _measure(trainer, spec, clock)


def unsloth_packed(
    spec: dict, clock: Clock, checkpointing: str | bool = "unsloth", most_rows: int | None = None
) -> None:
    """Train as `unsloth` does, but packed: as many tokens per step as TRL's packing and batches by tokens have here.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
        checkpointing: As in `unsloth`.
        most_rows: Largest number of rows per micro-batch; None for all of a step's.
    """
    rows = max(1, spec["batch_size"] // 2)
    at_once = min(rows, most_rows or rows)
    unsloth(spec, clock, checkpointing, rows // at_once, packing=True, per_device_train_batch_size=at_once)


def unsloth_packed_plain(spec: dict, clock: Clock) -> None:
    """Train as `unsloth_packed` does, with torch's checkpointing; Unsloth's own moves activations to the host.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    unsloth_packed(spec, clock, checkpointing=True)


def unsloth_packed_kept(spec: dict, clock: Clock) -> None:
    """Train as `unsloth_packed` does, without checkpointing; two rows at a time on a T4, for which it has the memory.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    unsloth_packed(spec, clock, checkpointing=False, most_rows=2 if spec["t4"] else None)


def unsloth_kept(spec: dict, clock: Clock) -> None:
    """Train as `unsloth` does, without checkpointing; two rows at a time, for which a T4 has the memory.

    Args:
        spec: What to measure, as compare.py writes it.
        clock: Clock of this process.
    """
    rows = min(2, spec["batch_size"])
    accumulation = spec["batch_size"] // rows
    unsloth(spec, clock, checkpointing=False, accumulation=accumulation, per_device_train_batch_size=rows)


def _base(spec: dict) -> tuple[Any, Any]:
    """The 4-bit base of transformers', and its tokenizer, which can pad."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    half = torch.float16 if spec["t4"] else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
    )
    place = {"": 0 if torch.cuda.is_available() else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        spec["base"], quantization_config=quantization, dtype=half, device_map=place
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def _options(spec: dict, folder: str) -> dict[str, Any]:
    """Options of transformers' Trainer that are the same for all."""
    return {
        "output_dir": folder, "per_device_train_batch_size": spec["batch_size"], "learning_rate": 2e-4,
        "lr_scheduler_type": "constant", "max_steps": 100_000, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip


def _measure(trainer: Any, spec: dict, clock: Clock) -> None:
    """Train between two scores of the same rows, and report."""
    collate, trainer.data_collator = trainer.data_collator, _counted(trainer.data_collator, clock)
    loss = _score(trainer, collate, spec)
    trainer.add_callback(_timer(clock))
    trainer.train()
    precision = "16-mixed" if trainer.args.fp16 else "bf16-mixed" if trainer.args.bf16 else "32-true"
    clock.report(loss, _score(trainer, collate, spec), precision)


def _adapters_in_fp32(trainer: Any, spec: dict) -> None:
    """SFTTrainer casts adapters to bf16, which a gradient scaler refuses (trl#4901)."""
    for parameter in trainer.model.parameters() if spec["t4"] else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _timer(clock: Clock) -> object:
    """A callback of transformers' Trainer that holds the clock."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.gradient_accumulation_steps != clock.batches_per_step:
                raise RuntimeError(f"a step is {clock.batches_per_step} here, not {args.gradient_accumulation_steps}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The loader has looked one batch ahead: it belongs to the next step.
            ahead = clock.pending[clock.batches_per_step :]
            del clock.pending[clock.batches_per_step :]
            if clock.step():
                control.should_training_stop = True
            clock.pending.extend(ahead)

    return Timer()


def _counted(collate: Callable[[list[dict]], dict], clock: Clock) -> Callable[[list[dict]], dict]:
    """A collator that reports what it makes to the clock."""

    def counted(examples: list[dict]) -> dict:
        lengths = [len(example["input_ids"]) for example in examples]
        batch = collate(examples)
        clock.batch(sum(lengths), batch["input_ids"].numel())
        return batch

    return counted


def _score(trainer: Any, collate: Callable[[list[dict]], dict], spec: dict) -> float:
    """The loss of the same rows, by the trainer's own code.

    In train mode: an evaluation would repack 4-bit weights on a CPU, and training go without their gradient.
    """
    import torch

    trainer.model.train()
    batch = collate(_rows(spec)[:SCORED_ROWS])
    batch = {
        key: value.to(trainer.model.device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return float(trainer.compute_loss(trainer.model, batch))


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


NAMES: dict[str, Callable[[dict, Clock], None]] = {
    peer.__name__: peer
    for peer in (
        lit_qlora, lit_qlora_tokens, lit_qlora_packed, trl_default, trl_grouped, trl_packed, plain, unsloth,
        unsloth_packed, unsloth_packed_plain, unsloth_packed_kept, unsloth_kept,
    )
}  # fmt: skip


def main() -> None:
    """Measure the peer that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=NAMES)
    parser.add_argument("spec", type=argparse.FileType(encoding="utf-8"), help="of compare.py")
    options = parser.parse_args()
    with options.spec as file:
        chosen = json.load(file)
    if options.peer.startswith("lit_qlora"):
        from lit_qlora.cli import prepare_memory

        prepare_memory()
    if chosen["t4"]:
        import as_t4

        as_t4.emulate()
    NAMES[options.peer](chosen, Clock(chosen))


if __name__ == "__main__":
    main()
