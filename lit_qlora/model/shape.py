"""Owns sizes that follow from a base's config.json alone: parameter counts of the base and of LoRA.

Knows no weights, no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Shape:
    """The widths of a Llama. Linear layers are ``(in, out)`` by name, of one decoder layer."""

    LINEARS: ClassVar = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    hidden: int
    num_layers: int
    vocabulary: int
    tied: bool
    linears: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From the contents of a Llama's config.json."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_width = config.get("head_dim") or hidden // heads
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
        return cls(hidden, config["num_hidden_layers"], config["vocab_size"], tied, linears)

    @property
    def num_quantized(self) -> int:
        """Weights that are kept in 4 bits: all linear layers of the decoder."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def num_parameters(self) -> int:
        """All weights of the base, norms included."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.num_quantized + embeddings + self.hidden * (2 * self.num_layers + 1)

    def num_lora(self, rank: int, target_modules: str | Sequence[str]) -> int:
        """Trained weights at ``rank`` on ``target_modules``, which are names of linear layers or ``all-linear``."""
        names = self.linears if target_modules == "all-linear" else target_modules
        names = [names] if isinstance(names, str) else names
        return self.num_layers * rank * sum(sum(self.linears[name]) for name in names)
