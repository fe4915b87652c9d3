"""Owns the arithmetic of a merge: base weights, as in training, plus LoRA's product, one tensor at a time.

Reads safetensors, the base's and the adapter's, without peft and without a model. Knows no folder to write to.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lit_qlora.errors import UserError
from lit_qlora.model import lora_config
from lit_qlora.model.base import Base
from lit_qlora.model.lora import stored_shapes
from lit_qlora.model.lora_names import parse_name
from lit_qlora.model.weights import BUFFER, STATE, is_linear, stored_tensors
from lit_qlora.storage.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lit_qlora.storage.foreign import read_object
from lit_qlora.tools.merge import Onto


class StoredWeights:
    """The tensors of a base by name, each read from its file on access.

    Args:
        base: a base with its weights.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self._files = {name: tensor.file for name, tensor in stored_tensors(base).items()}

    @property
    def names(self) -> list[str]:
        """The names of the model's weights, layer by layer, without the tensors that 4 bits keep beside them."""
        names = (name for name in self._files if not STATE.fullmatch(name) and not name.endswith(BUFFER))
        return sorted(
            names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
        )

    def __getitem__(self, name: str) -> Tensor:
        return _read_weight(self._files[name], name)

    def state(self, name: str) -> dict[str, str]:
        """Names of the tensors beside the 4-bit weight ``name``, by their last parts; empty for any other weight."""
        matches = (STATE.fullmatch(other) for other in self._files if other.startswith(f"{name}."))
        return {match[2]: match[0] for match in matches if match}

    def dequantized(self, name: str, device: torch.device) -> Tensor:
        """A dequantised 4-bit weight, fp32.

        Args:
            name: its name.
            device: device to compute on.
        """
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState.from_dict({key: self[full] for key, full in self.state(name).items()}, device)
        state.dtype = torch.float32
        return dequantize_4bit(self[name].to(device), state)


class LoraWeights:
    """An adapter's matrices, and their sum with a weight.

    Args:
        folder: the adapter's folder.

    Raises:
        UserError: for an unsupported kind of LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self._config = read_object(folder / ADAPTER_CONFIG)
        lora_config.check_config(folder, self._config)
        if self._config.get("lora_bias"):
            raise UserError(f"{folder} has lora_bias, and a merge adds to weights, not to biases", option="adapter")
        names = filter(None, map(parse_name, stored_shapes(folder)))
        self._file = safe_open(folder / ADAPTER_WEIGHTS, framework="pt")  # open, for a fit may replace the adapter
        self._keys = {(f"{name['module']}.weight", name["part"]): name[0] for name in names}
        """peft's names, by that of the base's weight and the part of LoRA."""

    @property
    def targets(self) -> set[str]:
        """Names of the base's weights that it changes."""
        return {name for name, _ in self._keys}

    def add_to(self, name: str, weight: Tensor) -> Tensor:
        """``weight + scale * B @ A``, with DoRA's magnitudes if any; ``weight`` itself where there is no LoRA.

        Args:
            name: name of the weight.
            weight: ``[out, in]``, fp32, which gives the device.

        Returns:
            The sum, ``[out, in]``, fp32.
        """
        if (name, "A") not in self._keys:
            return weight
        a, b = (self._file.get_tensor(self._keys[name, part]).to(weight) for part in "AB")
        rank = a.shape[0]
        alpha = lora_config.alpha_of(self._config, name.removesuffix(".weight"))
        merged = weight + alpha / (rank**0.5 if self._config.get("use_rslora") else rank) * (b @ a)
        key = self._keys.get((name, "magnitude_vector"))
        if key is not None:
            merged *= (self._file.get_tensor(key).to(weight) / merged.norm(dim=1))[:, None]
        return merged


def _read_weight(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)  # type: ignore[no-any-return]


def as_trained(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the model was trained on it: after NF4 with double quantisation, as in `lit_qlora.model.load`.

    Args:
        weight: the base's own.
        dtype: dtype in which it was loaded before it was quantised.

    Returns:
        The dequantised weight, fp32, of the same shape.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.to(dtype).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = torch.float32  # the products are computed from the levels themselves, not from rounded ones
    return dequantize_4bit(packed, state)


def merged_tensors(
    weights: StoredWeights, lora: LoraWeights, onto: Onto, trained_in: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the merged model, fp32, computed on ``device``, one after the other.

    Args:
        weights: weights of the base.
        lora: LoRA of the adapter.
        onto: ``quantized`` adds to the dequantised 4-bit base, ``original`` to the base as stored.
        trained_in: the dtype in which the base was loaded in training, before it was quantised.
        device: device to compute on; the results are equal.
    """
    for name in weights.names:
        if weights.state(name):
            value = weights.dequantized(name, device)
        else:
            value = weights[name].to(device)
            if onto == "quantized" and not weights.base.in_4_bits:  # there, 16-bit layers were trained in 16 bits
                value = as_trained(value, trained_in) if is_linear(name) else value.to(trained_in)
        yield name, lora.add_to(name, value.float())
