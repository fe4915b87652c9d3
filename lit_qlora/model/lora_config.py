"""Owns which adapters are supported, by the fields of peft's LoraConfig in their adapter_config.json.

Whether our own decoder layers compute one, or those of transformers and peft, `decoder.why_not` decides by the loaded
modules. Knows no weights.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_qlora.errors import UserError, cut, likely_meant
from lit_qlora.model.architectures import PLACES
from lit_qlora.model.lora_names import PREFIX, parse_name
from lit_qlora.storage.adapter import is_adapter
from lit_qlora.storage.folders import URL
from lit_qlora.storage.foreign import FLAG, SHARE, Kind, shown, whole

AS_SAVED = "take an adapter that is as it was saved"
LARGEST_COUNT = 65_536
"""Highest rank or index of a layer: far above those of any adapter."""
MATCHED_IN_S, MATCHED_LAYERS = 20, 80
"""Seconds in which all patterns of an adapter are to match the names of the modules of so many layers."""

_RANK, _LAYER = whole(1, LARGEST_COUNT), whole(0, LARGEST_COUNT)
_NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) <= 1e30)
_NAMES = Kind("names", lambda value: all(isinstance(name, str) for name in _as_list(value)))
_LAYERS = Kind("numbers of layers", lambda value: all(map(_LAYER.holds, _as_list(value))))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _by_name(kind: Kind) -> Kind:
    return Kind(
        f"{kind.expected}, by name", lambda value: isinstance(value, dict) and all(map(kind.holds, value.values()))
    )


COMPUTED = {
    "r": _RANK,
    "lora_alpha": _NUMBER,
    "lora_dropout": SHARE,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": _LAYERS,
    "layers_pattern": _NAMES,
    "rank_pattern": _by_name(_RANK),
    "alpha_pattern": _by_name(_NUMBER),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
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


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that an adapter is one that can be computed here.

    Args:
        folder: of the adapter, for messages.
        config: the contents of its adapter_config.json.

    Raises:
        UserError: for the first field that is not supported.
    """
    for name in ("r", "lora_alpha"):
        if config.get(name) is None:
            raise UserError(f"adapter_config.json lacks {name}", place=folder, remedy=AS_SAVED)
    for name, value in config.items():
        if name in WITHOUT_EFFECT or value is None:
            continue
        has = f"adapter_config.json has {cut(name)} {shown(value)}"
        if name in COMPUTED:
            if not COMPUTED[name].holds(value):
                raise UserError(f"{has}, expected {COMPUTED[name].expected}", place=folder)
        elif value not in (False, "", [], {}, *HARMLESS.get(name, ())):
            why = REFUSED.get(name, "this version does not know it")
            raise UserError(f"{has}, which can't be used here: {why}", place=folder)


def check_ranks(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check the ranks of an adapter before a layer is built, which with a wrong rank could take all memory.

    Its patterns are checked first.

    Args:
        folder: of the adapter, for messages.
        config: the contents of its adapter_config.json.
        shapes: of its weights, by peft's names.

    Raises:
        UserError: a rank differs from that of the weights.
    """
    _check_patterns(folder, config)
    patterns: dict[str, int] = config.get("rank_pattern") or {}
    names = ((parse_name(key), shape) for key, shape in shapes.items() if shape)
    stored = {name["module"]: shape for name, shape in names if name and name["part"] == "A"}
    for layer, shape in stored.items():
        rank = _of_layer(patterns, layer, config["r"])
        if rank != shape[0]:
            raise UserError(
                f"adapter_config.json gives {layer} the rank {rank}, and its weights have {shape[0]}",
                place=folder,
                remedy=AS_SAVED,
            )
    most = max((max(shape) for shape in stored.values()), default=0)
    too_large = [rank for rank in (config["r"], *patterns.values()) if rank > most]
    if stored and too_large:
        raise UserError(
            f"adapter_config.json has a rank of {too_large[0]}, and no layer is as wide", place=folder, remedy=AS_SAVED
        )


_MATCH = """
import json, re
from sys import exit, stdin as file
patterns, names = json.load(file)
for shown, pattern in patterns:
    try:
        for name in names:
            re.match(pattern, name)
    except (re.error, RecursionError, OverflowError) as error:
        exit(print(f"{shown}: {error}"))
"""


def _check_patterns(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for a pattern of modules' names that is none, or takes forever to match.

    Some, such as ``(a+)+b``, take longer than anybody waits: they are matched, as peft would, in a process that can be
    ended. It imports nothing from the current folder (-P), which may be the adapter's own.
    """
    whole_names = (config.get(name) for name in ("target_modules", "exclude_modules"))
    given = [(r"({})\Z", [found]) for found in whole_names if isinstance(found, str)]
    given += [(r"(.*\.)?({})$", [*(config.get(name) or ())]) for name in ("rank_pattern", "alpha_pattern")]
    given += [(r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", _as_list(config.get("layers_pattern") or []))]
    patterns = [
        (one, form.replace("{}", one)) for form, found in given for one in found if not re.fullmatch(r"[\w.]*", one)
    ]
    if not patterns:
        return
    parts = [*PLACES.values(), "self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm"]
    names = ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers"]
    names += [f"model.layers.{layer}.{part}" for layer in range(MATCHED_LAYERS) for part in parts]
    names += [f"{PREFIX}{name}" for name in names]
    what = "adapter_config.json has a pattern of modules that"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _MATCH],
            input=json.dumps([patterns, names]),
            stdout=subprocess.PIPE,
            text=True,
            timeout=MATCHED_IN_S,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        those = cut(" ".join(shown for shown, _ in patterns))
        raise UserError(f"{what} takes too long to match: {those}", place=folder, remedy="give names") from error
    if done.stdout:
        raise UserError(f"{what} is none: {cut(done.stdout.strip())}", place=folder, remedy=AS_SAVED)


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of LoraConfig from ``config``; all other fields are dropped, code that they may name too."""
    return {name: config[name] for name in COMPUTED if config.get(name) is not None}


def alpha_of(config: Mapping[str, Any], layer: str) -> float:
    """The alpha of a linear layer.

    Args:
        config: the contents of an adapter_config.json.
        layer: its name in the base, such as model.layers.0.self_attn.q_proj.
    """
    return float(_of_layer(config.get("alpha_pattern") or {}, layer, config["lora_alpha"]))


def _of_layer(patterns: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key([*patterns], layer), otherwise) if patterns else otherwise


def require_adapter(folder: Path) -> None:
    """Raises UserError unless ``folder`` is one on this machine that holds an adapter."""
    if URL.match(str(folder)):
        raise UserError(f"{folder} is a URL, and adapters are only read from this machine: give an adapter's folder")
    if not is_adapter(folder):
        below = folder / "adapter"  # of a run
        near = likely_meant(below if is_adapter(below) else None)
        if (folder / "config.json").is_file():
            near = "it is a whole model, which other programs load: see docs/serving.md"
        raise UserError(f"{folder} is no adapter: it has no adapter_config.json", remedy=near)
