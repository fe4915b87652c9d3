"""Owns the loading of a base that no process holds whole: tensor by tensor, of which each process keeps its share.

Of a 4-bit base, or its copy, only the share is read; a 16-bit one, of which there is no copy, is quantised weight by
weight, to the same bits as in `load.load_base`, and the rest of each is dropped. Knows no adapter and no Trainer.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_qlora.devices.world import world
from lit_qlora.errors import UserError
from lit_qlora.model import host
from lit_qlora.model.attention import implementation_of
from lit_qlora.model.base import Base
from lit_qlora.model.config import for_transformers
from lit_qlora.model.device import Attention
from lit_qlora.model.load import STORED_DTYPES, nf4, quantise, read_tensor, settle
from lit_qlora.model.shape import Shape
from lit_qlora.model.shards import Packed, Shards, TensorPart
from lit_qlora.model.weights import STATE, Stored, check_weights, fetch, stored_tensors
from lit_qlora.storage.files import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_host(shape: Shape) -> None:
    """Raises UserError, before a weight is loaded, if this machine's memory can't hold even the shares of its processes
    of a base of ``shape``."""
    here, memory = world(), host.memory_bytes()
    needed_bytes = shape.num_layers * shape.layer_bytes * here.local_size // here.size
    if memory and needed_bytes > memory[1]:
        raise UserError(
            f"host: {size(needed_bytes)} of the base's layers have to be in this machine's memory, page-locked, and "
            f"{size(memory[1])} are available",
            option="model.shard_to",
            remedy="end other programs, give --model.shard_to gpu with more devices, or take a smaller base",
        )


def load_sharded(
    base: Base, dtype: torch.dtype, device: torch.device, attention: Attention, on_host: bool
) -> tuple["PreTrainedModel", Shards]:
    """Load a base as `load.load_base` does, but for the decoder's linear layers, whose shares come as they are used.

    Args:
        base: base in 16 bits, or with all linear layers in 4.
        dtype: of the 4-bit products, the embedding, the norms and the head.
        device: device to load to.
        attention: transformers' implementation.
        on_host: True to keep this process's share in the host's memory.

    Returns:
        The frozen model, in eval mode, and the shares.

    Raises:
        UserError: its weights can't be read, or are not all in 4 bits.
    """
    fetch(base)
    plain = check_weights(base) if base.in_4_bits else []
    if plain:
        raise UserError(
            f"{base.name} keeps {plain[0]} in 16 bits, and only a base whose linear layers are all in 4 bits is shared",
            option="model.shard",
            remedy="give --model.shard false, or the 16-bit base",
        )
    model, stored = _skeleton(base, dtype, attention), stored_tensors(base)
    for name, parameter in [*model.named_parameters()]:
        if name in stored and not hasattr(parameter, "quant_state"):
            place, _, leaf = name.rpartition(".")
            value = read_tensor(stored[name]).to(device, dtype)
            setattr(model.get_submodule(place), leaf, nn.Parameter(value, requires_grad=False))
    if base.shape.tied:
        model.tie_weights()
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
    shards = Shards(device, on_host)
    for index, layer in enumerate(model.model.layers):
        shards.add([*_packed_linears(base, stored, index, layer, dtype, device)])
        # For transformers' own forward, in which answers are generated; ours opens the layers itself.
        layer.register_forward_pre_hook(lambda *_, index=index: shards.open(index, 1))
    shards.attach()
    settle(model, dtype)
    return model.eval(), shards


def _skeleton(base: Base, dtype: torch.dtype, attention: Attention) -> Any:
    """The model without weights, its linear layers made for 4 bits."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.integrations import replace_with_bnb_linear

    config = for_transformers({key: value for key, value in base.config.items() if key != "quantization_config"})
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation_of(attention))
        model: Any = replace_with_bnb_linear(made, modules_to_not_convert=["lm_head"], quantization_config=nf4(dtype))
    model.generation_config = GenerationConfig()
    model.is_loaded_in_4bit = True
    return model


def _packed_linears(
    base: Base, stored: Mapping[str, Stored], index: int, layer: Any, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[nn.Module, Packed]]:
    """The linear modules of a layer, each with a 4-bit weight, of which nothing has been read that has shares."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for place, module in layer.named_modules():
        if isinstance(module, Linear4bit):
            name = f"model.layers.{index}.{place}.weight"
            packed = _stored(stored, name, device) if base.in_4_bits else _quantised_weight(stored[name], dtype, device)
            weight = Params4bit(  # type: ignore[no-untyped-call]
                torch.empty(0, dtype=torch.uint8, device=device),
                quant_state=packed.state,
                blocksize=packed.state.blocksize,
                compress_statistics=packed.state.nested,
                quant_type=packed.state.quant_type,
                module=module,
                bnb_quantized=True,
            )
            module.weight, module.quant_state = weight, packed.state
            yield module, packed


def _stored(stored: Mapping[str, Stored], name: str, device: torch.device) -> Packed:
    """A weight of a 4-bit base; its tables are read, the rest is to be read in parts."""
    from bitsandbytes.functional import QuantState

    shared = ("absmax", "nested_absmax")
    beside = {match[2]: stored[match[0]] for match in filter(None, map(STATE.fullmatch, stored)) if match[1] == name}
    tensors = {key: torch.empty(0) if key in shared else read_tensor(value) for key, value in beside.items()}
    state = QuantState.from_dict(tensors, device)
    return Packed(state, tuple(map(_piece, (stored[name], *(beside[key] for key in shared if key in beside)))))


def _piece(stored: Stored) -> TensorPart:
    width = stored.value_bytes

    def read(first: int, count: int) -> Tensor:
        (found,) = stored.read([(first // width, count // width)])
        return torch.frombuffer(bytearray(found), dtype=torch.uint8)

    return TensorPart(STORED_DTYPES[stored.dtype], stored.shape, read)


def _quantised_weight(stored: Stored, dtype: torch.dtype, device: torch.device) -> Packed:
    """A 16-bit weight in 4 bits; all of it is here until its shares are taken."""
    weight = quantise(stored, dtype, device)
    state = weight.quant_state
    packed = Packed(state, (_made(weight.data), _made(state.absmax), _made(state.state2.absmax)))
    state.absmax = state.state2.absmax = torch.empty(0)
    return packed


def _made(tensor: Tensor) -> TensorPart:
    raw = tensor.contiguous().view(torch.uint8).flatten()
    return TensorPart(tensor.dtype, tuple(tensor.shape), lambda first, count: raw[first : first + count])
