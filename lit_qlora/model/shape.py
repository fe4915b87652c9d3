"""Owns sizes that follow from a base's config.json: parameter counts of the base and of LoRA.

Those of Llama 2 are known without a download. Knows no weights, no torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_qlora.model.architectures import LINEARS, architecture_of


def _llama_2(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


LLAMA_2_SIZES = {
    "7b": _llama_2(4096, 11008, 32, 32, 32),
    "13b": _llama_2(5120, 13824, 40, 40, 40),
    "70b": _llama_2(8192, 28672, 80, 64, 8),
}
"""Sizes of Llama 2, from their config.json files."""

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_TABLES = 4 * (16 + 256 + 1)
"""Each 4-bit weight's code books, and the offset of its scales, in fp32."""


def known_config(base: str) -> dict[str, Any] | None:
    """The sizes of a Llama 2 by hub id, ``base``, known without a download; None for any other."""
    found = re.fullmatch(r"(?:nousresearch/llama-2-(\d+b)-hf|meta-llama/llama-2-(\d+b)(?:-chat)?-hf)", base.lower())
    return LLAMA_2_SIZES.get(found[1] or found[2]) if found else None


def head_width_of(config: Mapping[str, Any]) -> int:
    """The width of a head of queries, keys and values, by a base's ``config``."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def target_names(target_modules: str | Sequence[str]) -> Sequence[str]:
    """The names of the targeted linear layers, spelled out: peft takes a string for a pattern.

    Args:
        target_modules: names of linear layers, or ``all-linear``.
    """
    if target_modules == "all-linear":
        return LINEARS
    return [target_modules] if isinstance(target_modules, str) else target_modules


@dataclass(frozen=True)
class Shape:
    """The widths of a base.

    Args:
        hidden: width of the hidden states.
        num_layers: decoder layers.
        vocabulary: ids, ``vocab_size`` of config.json.
        tied: True if the head is the embedding.
        linears: ``(in, out)`` of each linear layer of one decoder layer, by name.
        num_heads: of queries.
    """

    hidden: int
    num_layers: int
    vocabulary: int
    tied: bool
    linears: dict[str, tuple[int, int]]
    # Not shown: a base's fingerprint is taken over what is.
    num_heads: int = field(default=1, repr=False)
    biased: tuple[str, ...] = field(default=(), repr=False)
    """The linear layers that have a bias."""
    has_head_norms: bool = field(default=False, repr=False)
    """True if queries and keys are normalised per head."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """The shape of a base, from the contents of its config.json.

        Args:
            config: as `model.config.read_config` returns it.
        """
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_width = head_width_of(config)
        queries = heads * head_width
        keys = (config.get("num_key_value_heads") or heads) * head_width
        inner = config["intermediate_size"]
        linears = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        tied = bool(config.get("tie_word_embeddings", False))
        architecture = architecture_of(config)
        more = (heads, architecture.biased(config), architecture.has_head_norms)
        return cls(hidden, config["num_hidden_layers"], config["vocab_size"], tied, linears, *more)

    @property
    def head_width(self) -> int:
        """The width of a head of queries, keys and values."""
        return self.linears["q_proj"][1] // self.num_heads

    @property
    def num_quantized(self) -> int:
        """Number of weights in 4 bits: all linear layers of the decoder."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def num_parameters(self) -> int:
        """Number of weights of the base, norms and biases included."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        per_layer = sum(self.linears[name][1] for name in self.biased) + 2 * self.head_width * self.has_head_norms
        return self.num_quantized + embeddings + self.hidden * (2 * self.num_layers + 1) + self.num_layers * per_layer

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer's linear weights in NF4 with double quantisation, without their tables."""
        sizes = [inputs * outputs for inputs, outputs in self.linears.values()]
        scales = [math.ceil(size / NF4_BLOCK) for size in sizes]
        return sum(size // 2 for size in sizes) + sum(one + 4 * math.ceil(one / NF4_NESTED_BLOCK) for one in scales)

    def unshared_bytes(self, itemsize: int) -> int:
        """Bytes of what no share is made of: tables of 4-bit weights, embeddings, norms and biases.

        Args:
            itemsize: bytes per value that is not in 4 bits.
        """
        others = self.num_parameters - self.num_quantized
        return self.num_layers * len(self.linears) * NF4_TABLES + itemsize * others

    def num_lora(self, rank: int, target_modules: str | Sequence[str]) -> int:
        """Number of trained weights.

        Args:
            rank: of every targeted layer.
            target_modules: names of linear layers, or ``all-linear``.
        """
        return self.num_layers * rank * sum(sum(self.linears[name]) for name in target_names(target_modules))
