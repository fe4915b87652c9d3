"""Owns which adapters are supported, by the fields of peft's LoraConfig in their adapter_config.json.

Whether our own decoder layers compute one, or those of transformers and peft, `decoder.why_not` decides by the loaded
modules. Knows no weights.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_qlora.errors import UserError, cut
from lit_qlora.storage.foreign import shown

_REMEDY = "take an adapter that is as it was saved"
LARGEST_NUMBER, LARGEST_COUNT = 1e30, 65_536
"""Upper limits of an alpha, and of a rank or a layer index: far above those of any adapter."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_COUNT


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_layers(value: Any) -> bool:
    return all(_is_count(layer, 0) for layer in (value if isinstance(value, list) else [value]))


def _by_name(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


COMPUTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_count, "a whole number from 1"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_share, "a share from 0 to below 1"),
    "target_modules": (_are_names, "names"),
    "exclude_modules": (_are_names, "names"),
    "layers_to_transform": (_are_layers, "numbers of layers"),
    "layers_pattern": (_are_names, "names"),
    "rank_pattern": (_by_name(_is_count), "whole numbers from 1 by name"),
    "alpha_pattern": (_by_name(_is_number), "numbers by name"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
}
"""The fields that are used, and the kind of each unless null."""

WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    # Only for layers with transposed weights, which no base here has.
    "fan_in_fan_out",
    # Only about the start of training.
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",
    # Only with fields that are refused.
    "ensure_weight_tying", "megatron_core", "qalora_group_size",
    # Only for one process.
    "runtime_config",
}  # fmt: skip
"""The fields without effect once an adapter is trained, or on a base that is accepted here."""

REFUSED = {
    "modules_to_save": "whole layers were trained beside LoRA",
    "trainable_token_indices": "embeddings of tokens were trained beside LoRA",
    "bias": "biases of the base were trained beside LoRA",
    "init_lora_weights": "it was initialised from the base's weights, and needs their remainder; save it again with "
    "peft's path_initial_model_for_weight_conversion",
    "layer_replication": "the base's layers are there more than once",
    "target_parameters": "LoRA is on parameters that are no linear layer",
} | dict.fromkeys(
    (
        "alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config", "monteclora_config", "use_bdlora",
        "use_qalora", "velora_config",
    ),
    "it is an unsupported kind of LoRA",
)  # fmt: skip
"""The fields that change the computation, with the reason for the user; unknown fields count as such, too."""

HARMLESS: dict[str, list[Any]] = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "eva", "orthogonal"]}
"""Values of those that count as unset: with the last three, the base is unchanged."""


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for an unsupported ``config`` of the adapter in ``folder``."""
    for name in ("r", "lora_alpha"):
        if config.get(name) is None:
            raise UserError(f"adapter_config.json lacks {name}", place=folder, remedy=_REMEDY)
    for name, value in config.items():
        if name in WITHOUT_EFFECT or value is None:
            continue
        told = f"adapter_config.json has {cut(name)} {shown(value)}"
        if name in COMPUTED:
            is_right, expected = COMPUTED[name]
            if not is_right(value):
                raise UserError(f"{told}, expected {expected}", place=folder)
        elif value not in (False, "", [], {}, *HARMLESS.get(name, ())):
            why = REFUSED.get(name, "this version does not know it")
            raise UserError(f"{told}, which can't be used here: {why}", place=folder)


def check_ranks(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises UserError if the ranks in ``config`` differ from those of the weights in ``shapes``, by peft's names.

    Checked before a layer is built, which with a wrong rank could take all memory.
    """
    patterns: dict[str, int] = config.get("rank_pattern") or {}
    stored = {name.partition(".lora_A")[0]: shape for name, shape in shapes.items() if ".lora_A." in name and shape}
    for layer, shape in stored.items():
        try:
            rank = _of_layer(patterns, layer, config["r"])
        except re.error as error:
            raise UserError(f"adapter_config.json's rank_pattern holds no pattern: {error}", place=folder) from error
        if rank != shape[0]:
            raise UserError(
                f"adapter_config.json gives {layer.removeprefix('base_model.model.')} the rank {rank}, and its weights "
                f"have {shape[0]}",
                place=folder,
                remedy=_REMEDY,
            )
    most = max((max(shape) for shape in stored.values()), default=0)
    too_large = [rank for rank in (config["r"], *patterns.values()) if rank > most]
    if stored and too_large:
        raise UserError(
            f"adapter_config.json has a rank of {too_large[0]}, and no layer is as wide", place=folder, remedy=_REMEDY
        )


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of LoraConfig from ``config``; all other fields are dropped, code that they may name too."""
    return {name: config[name] for name in COMPUTED if config.get(name) is not None}


def alpha_of(config: Mapping[str, Any], layer: str) -> float:
    """The alpha of a linear layer by its full name, as in peft."""
    return float(_of_layer(config.get("alpha_pattern") or {}, layer, config["lora_alpha"]))


def _of_layer(patterns: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key([*patterns], layer), otherwise) if patterns else otherwise


def require_adapter(folder: Path) -> None:
    """Raises UserError unless ``folder`` is one on this machine that holds an adapter."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):  # a Path has one slash less
        raise UserError(f"{folder} is a URL, and adapters are only read from this machine: give an adapter's folder")
    if not (folder / "adapter_config.json").is_file():
        below = folder / "adapter"  # of a run
        near = f"; did you mean {below}?" if (below / "adapter_config.json").is_file() else ""
        raise UserError(f"{folder} is no adapter: it has no adapter_config.json{near}")
