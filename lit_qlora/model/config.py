"""Owns which keys of a base's config.json are read: a table of them, with what each may hold.

Other keys are dropped: token ids are the tokenizer's, how answers are drawn is an option of the verbs that answer, and
nothing that names code, kernels, plans or weight files gets any further. Knows no torch, no weights.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_qlora.errors import UserError
from lit_qlora.model.architectures import ARCHITECTURES, architecture_of
from lit_qlora.model.shape import head_width_of
from lit_qlora.storage.foreign import FLAG, OBJECT, SHARE, Kind, check, number, one_of, read_object, shown, whole, wrong

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SILU = ("silu", "swish")
"""Llama's activation, by its names in config.json."""
ACTIVATIONS = (
    *SILU, "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate",
    "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "mish", "hardswish", "sigmoid", "tanh",
)  # fmt: skip
"""Activations of transformers without weights or kernels of their own."""


def _numbers(count: int) -> Kind:
    above_0 = number(0)
    return Kind(
        f"a list of {count} numbers above 0",
        lambda value: isinstance(value, list) and len(value) == count and all(map(above_0.holds, value)),
    )


_ABOVE_0, _ABOVE_1 = number(0), number(1)
_NUM_TOKENS = whole(2, 2**31)
_UNIT = Kind("1, for all of a head is rotated", lambda value: type(value) in (int, float) and value == 1)

SIZES = {
    "hidden_size": whole(1, 2**20),
    "intermediate_size": whole(1, 2**24),
    "num_hidden_layers": whole(1, 1000),
    "num_attention_heads": whole(1, 2**16),
    "vocab_size": whole(1, 2**24),
}
"""Keys that every config.json must have."""

OPTIONAL = {
    "num_key_value_heads": whole(1, 2**16),
    "head_dim": whole(2, 2**16),
    "max_position_embeddings": whole(1, 2**31),
    "rms_norm_eps": number(0, 1),
    "hidden_act": one_of(*ACTIVATIONS),
    "attention_dropout": SHARE,
    "tie_word_embeddings": FLAG,
    "rope_theta": _ABOVE_1,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "partial_rotary_factor": _UNIT,
    "original_max_position_embeddings": _NUM_TOKENS,
    "quantization_config": OBJECT,
}
"""Optional keys; null counts as missing."""

NULL = ("num_key_value_heads", "sliding_window")
"""Keys that say something else by null (as many as query heads, no window) than by being missing."""


class _Members(NamedTuple):
    """The required and the optional members of a kind of rope."""

    needed: dict[str, Kind]
    allowed: dict[str, Kind]


_ROPE_KEYS = (
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings",
)  # fmt: skip
_OF_EACH_ROPE = {"rope_theta": _ABOVE_1, "partial_rotary_factor": _UNIT}
_ORIGINAL = {"original_max_position_embeddings": _NUM_TOKENS}
_FACTOR = {"factor": _ABOVE_0}


def _ropes(head_width: int) -> dict[str, _Members]:
    ratio = {"attention_factor": _ABOVE_0, **_ORIGINAL}
    betas = dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _ABOVE_0)
    halves = dict.fromkeys(("short_factor", "long_factor"), _numbers(head_width // 2))
    bands = dict.fromkeys(("low_freq_factor", "high_freq_factor"), _ABOVE_0)
    return {
        "default": _Members({}, {}),
        "linear": _Members(_FACTOR, {}),
        "dynamic": _Members(_FACTOR, {}),
        "yarn": _Members(_FACTOR, ratio | betas | {"truncate": FLAG}),
        "longrope": _Members(halves, _FACTOR | ratio),
        "llama3": _Members(_FACTOR | bands, _ORIGINAL),
    }


class Rope(NamedTuple):
    """How positions rotate queries and keys.

    Args:
        theta: the base of the wavelengths, as config.json has it.
        kind: such as ``default`` or ``llama3``.
        members: those of that kind, and any others beside them.
    """

    theta: Any
    kind: Any
    members: dict[str, Any]


def rope_of(config: Mapping[str, Any]) -> Rope:
    """The rope of any version's ``config``: ``rope_parameters``, or the older ``rope_scaling`` and ``rope_theta``."""
    members = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    members = {name: value for name, value in members.items() if value is not None}
    theta = members.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = members.pop("rope_type", None) or members.get("type") or "default"
    members.pop("type", None)
    return Rope(theta, kind, members)


def read_config(name: str, file: Path) -> dict[str, Any]:
    """The checked keys of a base's config.json, by which it is computed.

    Args:
        name: of the base, for messages.
        file: its config.json.

    Raises:
        UserError: naming the key, for an invalid value; for another architecture, and for a quantisation other than
            bitsandbytes' 4 bits.
    """
    try:
        return _read_config(name, file)
    except UserError as error:
        raise error.within("model.base") from error


def _read_config(name: str, file: Path) -> dict[str, Any]:
    stated = read_object(file, name)
    place = f"{name}: config.json"
    model_type = stated["model_type"] if isinstance(stated.get("model_type"), str) else "model of unknown type"
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{name} is a {shown(model_type)[1:-1]} by the model_type of its config.json, expected one of "
            f"{', '.join(ARCHITECTURES)} (text models that compute as Llama does, without experts)"
        )
    architecture = ARCHITECTURES[model_type]
    classes = stated.get("architectures") or [architecture.class_name]
    known_classes = {architecture.class_name, *architecture.aliases}
    if not (isinstance(classes, list) and known_classes & {*map(str, classes)}):
        raise wrong(place, "architectures", f'["{architecture.class_name}"]', classes)
    optional = OPTIONAL | dict(architecture.keys)
    config = {key: stated[key] for key in (*SIZES, *optional) if stated.get(key) is not None}
    for key, kind in SIZES.items():
        if key not in config:
            raise UserError(f"{place} has no {key}")
        check(place, key, kind, config[key])
    if config.get("quantization_config") == {}:
        del config["quantization_config"]
    if "quantization_config" in config:
        config["quantization_config"] = _quantization(name, place, config["quantization_config"])
    for key, kind in optional.items():
        if key in config:
            check(place, key, kind, config[key])
    missing = {key: value for key, value in architecture.defaults.items() if key not in config}
    config |= {key: None if key in stated and key in NULL else value for key, value in missing.items()}
    known = {"model_type": model_type, "architectures": [architecture.class_name]} | config
    _check_heads(place, known)
    _check_rope(place, known)
    return known


def _check_heads(place: str, config: Mapping[str, Any]) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads and (architecture_of(config).needs_divisor or not config.get("head_dim")):
        raise wrong(place, "num_attention_heads", f"a divisor of hidden_size ({hidden})", heads)
    pairs = config.get("num_key_value_heads") or heads
    if heads % pairs:
        raise wrong(place, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})", pairs)
    if head_width_of(config) % 2:
        width = config.get("head_dim", f"{hidden} / {heads} = {hidden // heads}")
        raise wrong(place, "head_dim", "an even number (default: hidden_size / num_attention_heads)", width)


def _check_rope(place: str, config: Mapping[str, Any]) -> None:
    scaling, parameters = (rope_of({key: config.get(key)}) for key in ("rope_scaling", "rope_parameters"))
    if config.get("rope_scaling") and config.get("rope_parameters") and scaling[1:] != parameters[1:]:
        raise wrong(place, "rope_scaling", "what rope_parameters says, or one of the two alone", config["rope_scaling"])
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    ropes = _ropes(head_width_of(config))
    kind, members = rope_of(config)[1:]
    check(place, f"{key}.rope_type", one_of(*ropes), kind)
    if kind == "dynamic" and head_width_of(config) == 2:
        raise wrong(place, f"{key}.rope_type", "another one for heads of width 2", kind)
    stated = {**members, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for member, value_kind in (ropes[kind].needed | ropes[kind].allowed | _OF_EACH_ROPE).items():
        if member in ropes[kind].needed and member not in members:
            raise UserError(f"{key} has no {member}, and {kind} needs it: {value_kind.expected}", place=place)
        if stated.get(member) is not None:
            check(place, f"{key}.{member}", value_kind, stated[member])
    for member, value in stated.items():  # one unknown to its kind has no effect, but nested ones are per layer
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, dict | list) for part in parts):
            raise wrong(place, f"{key}.{member}", "a plain value, for all layers rotate alike", value)
    if kind == "llama3" and members["high_freq_factor"] <= members["low_freq_factor"]:
        low = members["low_freq_factor"]
        raise wrong(place, f"{key}.high_freq_factor", f"more than low_freq_factor ({low})", members["high_freq_factor"])


def _quantization(name: str, place: str, stated: Any) -> dict[str, Any]:
    """Check that a quantization_config is bitsandbytes' 4 bits. The rest is read off the weights."""
    check(place, "quantization_config", OBJECT, stated)
    method = stated.get("quant_method") or ("bitsandbytes" if stated.get("load_in_4bit") else "in an unknown way")
    if method != "bitsandbytes" or stated.get("load_in_8bit") or stated.get("load_in_4bit") is not True:
        raise UserError(
            f"{name} is already quantised ({shown(method).strip(chr(34))}), by the "
            "quantization_config of its config.json",
            remedy="give the 16-bit weights or a bitsandbytes 4-bit copy",
        )
    levels, storage = stated.get("bnb_4bit_quant_type") or "nf4", stated.get("bnb_4bit_quant_storage") or "uint8"
    check(place, "quantization_config.bnb_4bit_quant_type", one_of("nf4", "fp4"), levels)
    check(place, "quantization_config.bnb_4bit_quant_storage", one_of("uint8"), storage)
    nested = stated.get("bnb_4bit_use_double_quant") or False
    check(place, "quantization_config.bnb_4bit_use_double_quant", FLAG, nested)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": levels,
        "bnb_4bit_use_double_quant": nested,
    }


def for_transformers(config: Mapping[str, Any], plain: Collection[str] = ()) -> "PreTrainedConfig":
    """transformers' config of a result of `read_config`.

    Args:
        config: of a base.
        plain: names of linear layers that a 4-bit base keeps in 16 bits.
    """
    architecture = architecture_of(config)
    values = {key: value for key, value in config.items() if key not in (*_ROPE_KEYS, "model_type")}
    theta, kind, members = rope_of(config)
    known = _ropes(head_width_of(config))[kind]
    rope = {name: value for name, value in members.items() if name in known.needed or name in known.allowed}
    if "original_max_position_embeddings" in known.allowed and "original_max_position_embeddings" in config:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if "attention_factor" in rope:
        rope["attention_factor"] = float(rope["attention_factor"])
    if "rms_norm_eps" in values:
        values["rms_norm_eps"] = float(values["rms_norm_eps"])
    if "quantization_config" in values:
        values["quantization_config"] = values["quantization_config"] | {"llm_int8_skip_modules": ["lm_head", *plain]}
    # Said outright, for what transformers takes for null or a missing one differs between architectures.
    values |= {
        "head_dim": head_width_of(config),
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    if architecture.window(config) is None:
        values.pop("layer_types", None)
    values |= {"rope_parameters": {"rope_type": kind, "rope_theta": float(theta), **rope}}
    return architecture.config_class()(**values)  # type: ignore[no-any-return]
