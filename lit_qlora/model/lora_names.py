"""Owns how peft names the weights of LoRA, in an adapter's file and in a model. Knows no weights."""

import re

from lit_qlora.model.architectures import LINEARS

PREFIX = "base_model.model."
"""What peft puts before a base's name of a module."""

_NAME = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<linear>{'|'.join(LINEARS)})"
    r"|.+?)\.lora_(?P<part>\w+(?:\.bias)?)(?:\.default)?(?:\.weight)?"
)


def parse_name(name: str) -> re.Match[str] | None:
    """The parts of the ``name`` of a weight of LoRA, None if it is not one.

    They are ``module``, the base's name of the adapted module; for a linear layer of the decoder, its ``layer`` (a
    number) and ``linear``; and ``part``, such as A, B, B.bias or magnitude_vector.
    """
    return _NAME.fullmatch(name)
