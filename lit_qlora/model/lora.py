"""Owns LoRA on a base: new, or from a saved adapter; and what is recorded beside its weights.

Its weights are fp32. Knows no Trainer.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lit_qlora.errors import UserError, one_line, require
from lit_qlora.model import lora_config
from lit_qlora.model.architectures import LINEARS
from lit_qlora.model.base import Base
from lit_qlora.model.device import dtype_name
from lit_qlora.model.fingerprint import fingerprint, short
from lit_qlora.model.lora_names import PREFIX, parse_name
from lit_qlora.model.shape import target_names
from lit_qlora.storage.adapter import remedy_of_damage
from lit_qlora.storage.files import disk_error
from lit_qlora.storage.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, MANIFEST, DamagedFolderError, verify_folder
from lit_qlora.storage.foreign import chat_template_in, read_object
from lit_qlora.storage.run import RECORD
from lit_qlora.text.formats import PromptFormat, from_record, make_format

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

DEFAULT_FORMAT = make_format()
PICKLE = "adapter_model.bin"
IN_CONFIG = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
"""Options of LoRA by their fields of adapter_config.json. The record repeats them, so that an alpha changed there is
noticed."""

Shapes = Mapping[str, list[int]]
"""Shapes of weights, by their names."""

BASE_KEYS = ("base", "base_fingerprint", "base_dtype")
"""Optional keys of the record about the base."""


@dataclass(frozen=True)
class Lora:
    """The options of LoRA, as peft's LoraConfig has them.

    Args:
        rank: ``r``.
        alpha: ``lora_alpha``; the scaling is alpha / rank, or alpha / sqrt(rank) with ``rslora``.
        dropout: share of the inputs of A that are dropped, from 0 to below 1.
        target_modules: names of linear layers, or a pattern or keyword of peft's.
        rslora: ``use_rslora``.
        dora: ``use_dora``.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: str | list[str]
    rslora: bool
    dora: bool


def add_lora(model: "PreTrainedModel", lora: Lora) -> "PeftModel":
    """Add a new adapter to ``model``; the output is the base's until it is trained.

    Args:
        model: the base, as `load_base` returns it.
        lora: rank, scaling and targets.

    Raises:
        UserError: a target module does not exist.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{key: getattr(lora, name) for name, key in IN_CONFIG.items()},
        lora_dropout=lora.dropout,
        target_modules=list(target_names(lora.target_modules)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def check_settings(folder: Path, lora: Lora) -> None:
    """Check options against those of an adapter to start from, which has its own rank, alpha and targets.

    Args:
        folder: of the adapter.
        lora: the options.

    Raises:
        UserError: for the first setting that differs.
    """
    targets = sorted({name["linear"] for name in map(parse_name, stored_shapes(folder)) if name and name["linear"]})
    asked = vars(lora) | {"target_modules": sorted(target_names(lora.target_modules))}
    for name, own in {**_settings(folder), "target_modules": targets}.items():
        if own != asked[name]:
            given = f"'{json.dumps(own)}'" if isinstance(own, list) else str(own).lower()
            raise UserError(
                f"{asked[name]}, and the adapter {folder} has {own}",
                option=f"model.{name}",
                remedy=f"give --model.{name} {given}",
            )


def _settings(folder: Path) -> dict[str, Any]:
    """Rank, alpha, rslora and dora of an adapter, by its adapter_config.json."""
    config = read_object(folder / ADAPTER_CONFIG)
    return {name: config.get(key) or False for name, key in IN_CONFIG.items()}


def weights_digest(folder: Path) -> str:
    """A sha256 over the weights of the adapter in ``folder``, by which a copy of it elsewhere is the same one."""
    with (folder / ADAPTER_WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ranks(folder: Path, num_layers: int) -> tuple[dict[str, int], ...]:
    """An adapter's rank by linear layer, for each decoder layer: its patterns may give it many.

    Args:
        folder: of the adapter.
        num_layers: decoder layers of its base.

    Raises:
        UserError: its weights can't be read.
    """
    found: dict[int, dict[str, int]] = {layer: {} for layer in range(num_layers)}
    for key, shape in stored_shapes(folder).items():
        name = parse_name(key)
        if name and name["linear"] and name["part"] == "A":
            found.setdefault(int(name["layer"]), {})[name["linear"]] = shape[0]
    return tuple(found.values())


def adapted_layers(model: "PeftModel") -> set[int]:
    """The numbers of the decoder layers of ``model`` that have LoRA, from 0."""
    return {int(name["layer"]) for name in map(parse_name, adapter_parameters(model)) if name and name["layer"]}


def has_bias(folder: Path | None) -> bool:
    """True if the LoRA of the adapter in ``folder`` has biases, which our own layers don't compute."""
    return folder is not None and bool(read_object(folder / ADAPTER_CONFIG).get("lora_bias"))


def load_adapter(
    model: "PreTrainedModel", base: Base, folder: Path, trainable: bool, dropout: float | None = None
) -> "PeftModel":
    """Load a saved adapter onto a base.

    Args:
        model: of ``base``, as `load_base` returns it.
        base: compared with the one that the adapter records.
        folder: of the adapter.
        trainable: True to train it further.
        dropout: share of LoRA's inputs that training drops; None: the adapter's own.

    Raises:
        UserError: the folder is no adapter, was altered, was trained on another base, or does not fit.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    record = read_record(folder)
    recorded = record["base_fingerprint"]
    if recorded not in (None, fingerprint(base)):
        raise UserError(
            f"this adapter was trained on {record['base']} ({short(str(recorded))}), the base given "
            f"is {base.public_name} ({short(fingerprint(base))})",
            place=folder,
            remedy="give its own with --model.base or --base",
        )
    stored = stored_shapes(folder)
    try:
        given = lora_config.arguments(read_object(folder / ADAPTER_CONFIG))
        config = LoraConfig(**given, task_type="CAUSAL_LM", inference_mode=not trainable)
        if dropout is not None:
            config.lora_dropout = dropout
        peft_model = PeftModel(model, config)  # type: ignore[arg-type]
        # Without the search for new embeddings, which would contact the hub.
        state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        wanted = {name: list(tensor.shape) for name, tensor in state.items()}
        check_shapes(stored, wanted, f"this adapter does not fit {base.public_name}", place=folder)
        peft_model.load_adapter(str(folder), "default", is_trainable=trainable)
    except (SafetensorError, OSError, ValueError, re.error) as error:
        raise _unreadable(folder, error) from error
    where = {"place": folder / ADAPTER_WEIGHTS, "remedy": "take another checkpoint"}
    check_finite(adapter_parameters(peft_model), **where)
    return peft_model


def check_finite(weights: Mapping[str, torch.Tensor], **where: Any) -> None:
    """Raises UserError, with the fields ``where``, for the first of an adapter's ``weights`` that is not finite."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{name} holds values that are not finite", **where)


def check_shapes(found: Shapes, expected: Shapes, problem: str, **where: Any) -> None:
    """Check the weights of an adapter against those of the model that it is for.

    Args:
        found: shapes by name.
        expected: those of the model.
        problem: the problem if they differ, in a few words.
        where: further fields of the error.

    Raises:
        UserError: for the first by name that differs, is missing, or is one more.
    """
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            wanted = expected.get(name, "no such weight")
            raise UserError(f"{problem}: {name} is {found.get(name, 'missing')}, expected {wanted}", **where)


def load_adapter_weights(model: "PeftModel", folder: Path) -> None:
    """Load the weights of an adapter into a model that has one of just this shape.

    Args:
        model: the base with its adapter.
        folder: of the adapter to load.

    Raises:
        UserError: it was altered.
    """
    from peft import set_peft_model_state_dict

    own = {name: getattr(model.peft_config["default"], key) for name, key in IN_CONFIG.items()}
    outcome: Any = set_peft_model_state_dict(model, read_weights(folder, own))
    assert not outcome.unexpected_keys, f"{folder} holds weights that this adapter lacks"


def read_weights(folder: Path, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of an adapter that this run saved, by peft's names.

    Args:
        folder: of the adapter.
        expected: rank, alpha, rslora and dora of the run, by these names.

    Raises:
        UserError: they are not finite, or are applied otherwise than in the run.
    """
    _check_unaltered(folder, expected)
    file = folder / ADAPTER_WEIGHTS
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder, error) from error
    check_finite(weights, place=file)
    return weights


def save_adapter(model: "PeftModel", base: Base, folder: Path, prompt_format: PromptFormat = DEFAULT_FORMAT) -> None:
    """Write a plain PEFT adapter, with a record of base, LoRA and prompt format.

    Args:
        model: the base with the adapter.
        base: of which the name that may be published and the fingerprint are recorded.
        folder: an existing one.
        prompt_format: prompt format that the adapter was trained with.

    Raises:
        OSError: a file can't be written.
    """
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    except SafetensorError as error:
        raise disk_error(error, folder) from error
    # peft writes the local path of the base and an empty card; neither may leave this machine.
    config_file = folder / ADAPTER_CONFIG
    config = read_object(config_file)
    config["base_model_name_or_path"] = base.public_name
    # peft keeps them in a set, whose order differs between processes.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / CARD).unlink(missing_ok=True)
    record = {"base": base.public_name, "base_fingerprint": fingerprint(base), **prompt_format.record()}
    # The values in 4 bits depend on the dtype that they were rounded to before.
    record["base_dtype"] = dtype_name(model.get_input_embeddings().weight.dtype)
    record |= {name: config[key] for name, key in IN_CONFIG.items()}
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The base and prompt format recorded in an adapter folder; for one made elsewhere, what its files have of both.

    Raises UserError if ``folder`` is no adapter, was altered, or has a prompt format unknown to this version.
    """
    lora_config.require_adapter(folder)
    config = read_object(folder / ADAPTER_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"adapter_config.json has the peft_type {kind or 'null'}, expected LORA", place=folder)
    if (folder / MANIFEST).is_file():
        try:
            verify_folder(folder)
        except DamagedFolderError as error:
            raise error.replace(
                problem=f"{error.problem}: the adapter was altered or cut short after it was saved",
                remedy=f"{remedy_of_damage(folder)}, or, if that was meant, delete its {MANIFEST}",
            ) from error
    record: dict[str, Any] = {"base": None, "base_fingerprint": None}
    if (folder / RECORD).is_file():
        record |= DEFAULT_FORMAT.record() | read_object(folder / RECORD)
        for name in BASE_KEYS:
            stated = record.get(name)
            require(isinstance(stated, str | None), name, "a text", stated, place=f"{folder}: {RECORD}")
        if not record["base"] or not record["base_fingerprint"]:
            raise UserError(
                f"its {RECORD} does not name its base: it was altered", place=folder, remedy=lora_config.AS_SAVED
            )
        _check_unaltered(folder, record, f"{lora_config.AS_SAVED}, or, if that was meant, delete its {RECORD}")
    else:
        of = config.get("base_model_name_or_path")
        record["base"] = of if isinstance(of, str) and of.strip() else None
        record |= make_format(chat_template_in(folder)).record()
    lora_config.check_config(folder, config)
    stored = stored_shapes(folder)
    lora_config.check_ranks(folder, config, stored)
    for key in sorted(stored, key=lambda name: (not parse_name(name), name)):
        parts = parse_name(key)
        if not parts and ".lora_" in key:
            problem = f"{key} is no name of peft's, expected {PREFIX}….lora_A.weight or its like"
            raise UserError(problem, place=folder, remedy="save it with peft (save_pretrained)")
        if not parts:
            problem = f"it holds {key}, no weight of LoRA: added tokens and layers trained whole can't be used here"
            remedy = "if the base has the same, save it again with save_embedding_layers=False"
            raise UserError(problem, place=folder, remedy=remedy)
        if not parts["linear"]:
            problem = f"by adapter_config.json's target_modules it has LoRA on {parts['module']}"
            remedy = f"expected linear layers of the decoder: {', '.join(LINEARS)}"
            raise UserError(f"{problem}, which can't be used here", place=folder, remedy=remedy)
    _format(record, folder)
    return record


def read_format(adapter: Path) -> PromptFormat:
    """The prompt format of ``adapter``: as recorded, else assumed: its tokenizer's chat template, or Llama 2's format.

    Raises UserError as `read_record` does.
    """
    return _format(read_record(adapter), adapter)


def _format(record: Mapping[str, Any], folder: Path) -> PromptFormat:
    if record["base_fingerprint"]:
        return from_record(record, folder, RECORD)
    return replace(from_record(record, folder, "its tokenizer"), is_assumed=True)


def _check_unaltered(folder: Path, expected: Mapping[str, Any], remedy: str | None = None) -> None:
    """Raises UserError if adapter_config.json has other options of LoRA than its record or its run."""
    for name, found in _settings(folder).items():
        own = expected.get(name)
        if own != found:
            problem = f"adapter_config.json has {IN_CONFIG[name]} {found}, expected {own}: it was altered"
            raise UserError(problem, place=folder, remedy=remedy)


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights of the adapter in ``folder``, by peft's names. Raises UserError if they can't be read."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError) and (folder / PICKLE).is_file():
        remedy = "load and save it with peft (save_pretrained) where you trust it"
        return UserError(f"its weights are in {PICKLE}, which can execute code", place=folder, remedy=remedy)
    return UserError(f"the adapter can't be read: {one_line(error)}", place=folder)


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of LoRA of ``model`` by name: all that is ever trained, saved or resumed."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
