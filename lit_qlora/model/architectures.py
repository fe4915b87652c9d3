"""Owns the architectures that a base may have, and all that distinguishes one from Llama's.

Each is an entry in `ARCHITECTURES`, by its model_type in config.json; the rest of `model` asks the entry, and no other
module names one. Knows no weights, no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from lit_qlora.storage.foreign import FLAG, Kind, whole

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer, of every architecture."""
ATTENTION, MLP = LINEARS[:4], LINEARS[4:]
PLACES = {name: f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in LINEARS}
"""The path of each linear layer within its decoder layer."""

_WINDOW = whole(1, 2**31)
_LAYER_TYPES = Kind(
    "a list of full_attention and sliding_attention",
    lambda value: isinstance(value, list) and all(one in ("full_attention", "sliding_attention") for one in value),
)


@dataclass(frozen=True)
class Architecture:
    """A decoder that computes as Llama's does, but for what is stated here.

    Args:
        model_type: name in config.json, and of transformers' module.
        prefix: of the names of transformers' classes.
        aliases: other names of the class in config.json that mean the same.
        biases: the linear layers that have a bias: always (None), or where the named key of config.json is true.
        has_head_norms: True if queries and keys are normalised per head, before the rotation.
        needs_divisor: True if transformers has heads divide the hidden size even where ``head_dim`` is given.
        keys: what config.json may hold beside the keys of all architectures, and what each must be.
        defaults: values of keys that are missing in config.json, where transformers' are not those of Llama.
        window: of a config.json, how many tokens back some layer sees at most, itself included; None if all see all.
    """

    model_type: str
    prefix: str
    aliases: tuple[str, ...] = ()
    biases: Mapping[str, str | None] = field(default_factory=dict)
    has_head_norms: bool = False
    needs_divisor: bool = False
    keys: Mapping[str, Kind] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window: Callable[[Mapping[str, Any]], int | None] = lambda _: None

    @property
    def class_name(self) -> str:
        """The name of transformers' class of the model."""
        return f"{self.prefix}ForCausalLM"

    def model_class(self) -> Any:
        """transformers' class of the model."""
        return getattr(import_module("transformers"), self.class_name)

    def config_class(self) -> Any:
        """transformers' class of its config.json."""
        return getattr(import_module("transformers"), f"{self.prefix}Config")

    def layer_classes(self) -> tuple[type, type, type, type]:
        """transformers' classes of a decoder layer, its attention, its feed-forward and its norms."""
        module = import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")
        layer, attention, mlp, norm = (
            getattr(module, f"{self.prefix}{part}") for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm")
        )
        return layer, attention, mlp, norm

    def biased(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The linear layers that have a bias in a base with this config.json, ``config``."""
        return tuple(name for name, key in self.biases.items() if key is None or config.get(key))

    def identity(self, config: Mapping[str, Any]) -> tuple[Any, ...]:
        """The architecture's part of the fingerprint of a base with ``config``; empty for Llama, which at first was the
        only one.
        """
        return () if self.model_type == "llama" else (self.model_type, self.window(config))


def _qwen_window(config: Mapping[str, Any]) -> int | None:
    """The sliding window by transformers' rule: of layers from max_window_layers on, or of those in layer_types."""
    types = config.get("layer_types")
    slides = "sliding_attention" in types if types else config["max_window_layers"] < config["num_hidden_layers"]
    return config["sliding_window"] if config.get("use_sliding_window") and slides else None


_QWEN: dict[str, Any] = {
    "keys": {
        "use_sliding_window": FLAG,
        "sliding_window": _WINDOW,
        "max_window_layers": whole(0, 1000),
        "layer_types": _LAYER_TYPES,
    },
    "window": _qwen_window,
}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            "llama",
            "Llama",
            aliases=("LLaMAForCausalLM",),  # in early conversions, which are otherwise the same
            biases=dict.fromkeys(ATTENTION, "attention_bias") | dict.fromkeys(MLP, "mlp_bias"),
            needs_divisor=True,
            keys={"attention_bias": FLAG, "mlp_bias": FLAG},
            defaults={"max_position_embeddings": 2048},
        ),
        Architecture(
            "mistral",
            "Mistral",
            keys={"sliding_window": _WINDOW},
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            window=lambda config: config["sliding_window"],
        ),
        Architecture("qwen2", "Qwen2", biases=dict.fromkeys(ATTENTION[:3]), defaults=_QWEN_DEFAULTS, **_QWEN),
        Architecture(
            "qwen3",
            "Qwen3",
            biases=dict.fromkeys(ATTENTION, "attention_bias"),
            has_head_norms=True,
            defaults=_QWEN_DEFAULTS | {"head_dim": 128},
            **(_QWEN | {"keys": _QWEN["keys"] | {"attention_bias": FLAG}}),
        ),
    )
}
"""The accepted architectures, by model_type."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a base's config.json, ``config``; Llama where it names none."""
    return ARCHITECTURES[config.get("model_type", "llama")]
