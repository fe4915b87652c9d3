"""Owns the messages of libraries that are suppressed, each with its reason.

Called after lightning is imported, which sets levels of its own.

Only messages that a user can't act on are listed, one by one; all others are shown.
"""

import logging
import os
import warnings
from contextlib import suppress

LOGGERS = {
    # Which accelerators exist, that a seed was set, and advertisements; the run says what it decided.
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    # A conversation longer than the tokenizer's limit is cut by us, and counted.
    "transformers.tokenization_utils_base": logging.ERROR,
    # That a tokenizer.model needs another package: five lines, and then the error says so in one.
    "transformers.tokenization_utils_tokenizers": logging.ERROR,
    # What could be better in the scaling of a base's positions; whether it can be computed is checked by us.
    "transformers.modeling_rope_utils": logging.ERROR,
    # That a sample answer beside a longer prompt leaves the base's context: it is cut there, and counted.
    "transformers.generation.stopping_criteria": logging.ERROR,
    # Each retry of a hub that can't be reached; what that means is said once, by us.
    "huggingface_hub.utils._http": logging.ERROR,
    # That a push had nothing new; said by us.
    "huggingface_hub.hf_api": logging.ERROR,
    # That a data set's page has no table of properties, each time it is asked.
    "huggingface_hub.repocard": logging.ERROR,
    # That rows come from the cache where the hub is silent, four times over; how many they are is said by us.
    "datasets.load": logging.ERROR,
    "datasets.packaged_modules.cache.cache": logging.ERROR,
    # On a CPU: that an optional package with another kernel is not there.
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
}

WARNINGS = (
    # Between Lightning and torch: an old name of the other's, on every start.
    r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",
    # Between Lightning and jsonargparse: an old name, too, where options are made into objects.
    r"(?s).*(instantiate_classes|JsonargparseDeprecationWarning).*",
    # Between peft and transformers: an old name, too, of an attribute.
    r".*is_gradient_checkpointing` is deprecated.*",
    # That an adapter with lora_bias can't be merged, which merge says, and that its biases look cut short to peft.
    r".*`lora_bias=True` was passed but the targeted layer.*",
    r".*LoRA tensor\(s\) have invalid shape. [^ ]*\.lora_B\.bias.*",
    # That a pattern or an exclusion of an adapter made elsewhere fits no layer: it has no effect, here as there.
    r".*_pattern keys did not match any targeted module.*",
    r".*You have passed exclude_modules=.* but no modules were excluded.*",
    # In fp16 the gradient scaler skips first steps by design; they are counted, and recorded.
    r".*Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",
    # A checkpoint may have a word of early stopping, which scoring and a start without it have no use for.
    r".*Be aware that when using `ckpt_path`, callbacks used to create the checkpoint.*",
    # On a machine of SLURM's: that srun is there and not used. Where it is, we have read what it left already.
    r".*The `srun` command is available on your system but is not used.*",
    # Held-out figures are sums over all processes by then.
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*",
    # Figures are recorded after the last step, too, whatever the interval.
    r".*is smaller than the logging interval.*",
)


def quieten() -> None:
    """Silence known noise of the libraries, for this process."""
    for name, level in LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    with suppress(ImportError):  # doctor works without
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # of files of a few bytes; that of a base's weights is ours
    # Unset, a forked loader worker prints a page about the tokenizer's threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
