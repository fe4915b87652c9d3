"""Owns small bases of each architecture that is accepted: random, seeded weights, and tokenizers of their kinds."""

# ruff: noqa: RUF001  # DeepSeek's special tokens are written so

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lit_qlora.model.architectures import ARCHITECTURES

WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 172,  # not divisible by 32, as real models' widths can be
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "initializer_range": 0.1,
    "attention_dropout": 0.0,  # of which some architectures have more by default; our layers have none
    "tie_word_embeddings": False,
}
"""Widths of every base here, and of the tiny Llama."""
ROPE_LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPE_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3.2": ("llama", {"rope_parameters": ROPE_LLAMA_3, "tie_word_embeddings": True}),
    "codellama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 32, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral v0.1": ("mistral", {"sliding_window": 128}),
    "mistral nemo": ("mistral", {"sliding_window": None, "hidden_size": 60, "num_attention_heads": 8, "head_dim": 16}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2.5 yarn": ("qwen2", {"rope_parameters": ROPE_YARN}),
    "qwen2 that slides": ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}
"""model_type and config.json of small bases, by what each is like."""


def save_base(folder: Path, like: str, tokenizer: str | None = None, seed: int = 0, **changes: Any) -> Path:
    """Writes a small random base of `BASES` into ``folder``; its norms and biases are random, too."""
    model_type, own = BASES[like]
    save_random(folder, model_type, seed, "norm", {"max_position_embeddings": 512} | own | changes)
    if tokenizer:
        save_tokenizer(folder, tokenizer)
    return folder


def save_random(folder: Path, model_type: str, seed: int, norms: str, config: dict[str, Any]) -> Path:
    """Writes a base of `WIDTHS` and ``config``, of random weights, and norms of whose name ``norms`` is part."""
    import torch

    architecture = ARCHITECTURES[model_type]
    torch.manual_seed(seed)
    model = architecture.model_class()(architecture.config_class()(**WIDTHS | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.5)
            elif norms in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


TEXTS = [
    "Tom has a red boat, and Ann has 12 blue ones; they don't sail at night.",
    "Where does Ann live? She lives by the sea, in a small white house.",
    "user assistant system\nYou are brief.\n\n  def f(x):\n    return x + 1\n",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers cut a text into words."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def byte_level(specials: tuple[str, ...], split: str = SPLIT) -> str:
    """A byte-level BPE tokenizer's rules, as Qwen and Llama 3 have them."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([*specials])
    return str(tokenizer.to_str())


@cache
def sentencepiece_like(specials: tuple[str, ...], prefix: bool = True) -> str:
    """The rules of a BPE tokenizer that writes a space as U+2581, as Llama 2 and Mistral have them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace] if prefix else [replace])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=440, special_tokens=["<unk>", *specials, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator([text.replace(" ", " \u2581") for text in TEXTS], trainer)
    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] not in byte_tokens]
    rules["pre_tokenizer"] = None
    return json.dumps(rules, ensure_ascii=False)


def begun(rules: str) -> str:
    """The rules with a BOS before each text: the first of the special tokens, or the second after an unknown one."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(rules)
    number = 1 if tokenizer.id_to_token(0) == "<unk>" else min(tokenizer.get_added_tokens_decoder())
    bos = tokenizer.id_to_token(number)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return str(tokenizer.to_str())


LLAMA_3_SPLIT = SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
LLAMA_3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('only user and assistant') }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TOKENIZERS: dict[str, tuple[Callable[[], str], dict[str, Any]]] = {
    "qwen": (
        lambda: byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None,
         "pad_token": "<|endoftext|>", "add_bos_token": False, "chat_template": CHATML},
    ),
    "llama 3": (
        lambda: begun(byte_level(
            ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            LLAMA_3_SPLIT,
        )),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
         "chat_template": LLAMA_3},
    ),
    # DeepSeek's distilled ones: the class of another kind, no pad but one that looks like nothing else.
    "deepseek": (
        lambda: byte_level(("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")),
        {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<｜begin▁of▁sentence｜>", "legacy": True,
         "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>", "unk_token": None},
    ),
    "mistral": (
        lambda: begun(sentencepiece_like(("<s>", "</s>"))),
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "pad_token": None, "chat_template": MISTRAL, **NAMES},
    ),
    "mistral v0.3": (
        lambda: begun(sentencepiece_like(("<s>", "</s>", "[INST]", "[/INST]"))),
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None, "chat_template": MISTRAL, **NAMES},
    ),
    "yi": (
        lambda: sentencepiece_like(("<|startoftext|>", "<|endoftext|>"), prefix=False),
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<|startoftext|>",
         "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<unk>", "add_bos_token": False},
    ),
}  # fmt: skip
"""tokenizer.json and tokenizer_config.json of each kind."""


def save_tokenizer(folder: Path, kind: str) -> Path:
    """Writes a tokenizer of a kind of `TOKENIZERS` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rules, config = TOKENIZERS[kind]
    (folder / "tokenizer.json").write_text(rules(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
