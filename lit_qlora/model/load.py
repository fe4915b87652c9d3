"""Owns the loading of a base in 4-bit.

It is frozen, and in 16 bits where it is not in 4. Knows no adapter and no Trainer.
"""

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from lit_qlora.console import bars_of_transformers
from lit_qlora.errors import UserError, one_line
from lit_qlora.model.attention import implementation_of
from lit_qlora.model.base import Base
from lit_qlora.model.config import for_transformers
from lit_qlora.model.device import Attention
from lit_qlora.model.weights import Stored, check_weights, fetch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

ONE_THREAD_BELOW = 20_000_000
"""Number of weights below which threads on a CPU mostly wait for each other: beside another process, the demo took 17
times as long on two threads as on one."""

STORED_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8,
}  # fmt: skip
"""safetensors' names of dtypes."""


def load_base(base: Base, dtype: torch.dtype, device: torch.device, attention: Attention) -> "PreTrainedModel":
    """Load a base in NF4 with double quantisation (Dettmers et al., 2023), one tensor in host memory at a time.

    Args:
        base: its weights are downloaded first where they are on the hub.
        dtype: of the 4-bit products, the embedding, the norms and the head.
        device: device to load to.
        attention: transformers' implementation.

    Returns:
        The frozen model, in eval mode.

    Raises:
        UserError: its weights can't be read.
    """
    from transformers import GenerationConfig

    fetch(base)
    config = for_transformers(base.config, check_weights(base))
    if device.type == "cpu" and base.shape.num_parameters < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        with bars_of_transformers():
            model: PreTrainedModel = base.architecture.model_class().from_pretrained(
                base.location,
                # By default, it follows config.json and generation_config.json blindly.
                config=config,
                generation_config=GenerationConfig(),
                quantization_config=None if base.in_4_bits else nf4(dtype),
                dtype=dtype,
                device_map={"": device},
                attn_implementation=implementation_of(attention),
                use_safetensors=True,
            )
    except (SafetensorError, OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"the weights of {base.name} can't be loaded: {reason}", option="model.base") from error
    settle(model, dtype)
    return model


def nf4(dtype: torch.dtype) -> "BitsAndBytesConfig":
    """How a base in 16 bits is quantised: NF4 with double quantisation, computing in ``dtype``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantise(stored: Stored, dtype: torch.dtype, device: torch.device) -> Any:
    """A 16-bit weight, quantised to the bits that `load_base` has.

    Args:
        stored: where it stands in a file.
        dtype: dtype that the weight is rounded to before.
        device: device that quantises it, and holds the result.
    """
    from bitsandbytes.nn import Params4bit

    value = read_tensor(stored).to(device, dtype)
    weight: Any = Params4bit(value, compress_statistics=True, quant_type="nf4")  # type: ignore[no-untyped-call]
    return weight.to(device)


def read_tensor(stored: Stored) -> torch.Tensor:
    """A whole tensor of a file, by where it is ``stored``."""
    (found,) = stored.read([(0, stored.num_values)])
    return torch.frombuffer(bytearray(found), dtype=STORED_DTYPES[stored.dtype]).reshape(stored.shape)


def settle(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Freeze a loaded base.

    Args:
        model: base with its linear layers in 4 bits.
        dtype: dtype of its products, and of all else that is not in 4 bits.
    """
    from bitsandbytes.nn import Linear4bit

    model.requires_grad_(False)
    for parameter in model.parameters():
        # transformers 5.23 leaves a base in 4 bits as its files have it: a T4 would get its embedding in bf16.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in (module for module in model.modules() if isinstance(module, Linear4bit)):
        module.compute_dtype = dtype
        # On a CPU with AVX512-BF16 an evaluation would repack the weights for inference, and every
        # training step after it would go without their gradient, or stop at widths not divisible by 32.
        module.support_avx512bf16_for_cpu = False
