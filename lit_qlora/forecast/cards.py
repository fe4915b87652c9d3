"""Owns the table of GPUs by name: memory, compute capability, and sustained rates. Knows no model.

Memory is `torch.cuda.get_device_properties().total_memory`, as seen in published logs, in GiB of 1024^3 bytes. Rates
are what large 16-bit products and memory traffic sustain over minutes: measured where the comment says so, else a share
of the data sheet (dense, fp32 accumulation) that comparable cards reach: 75 % of the FLOP/s and 80 % of the bandwidth,
85 % with HBM.
"""

import re
from dataclasses import dataclass

from lit_qlora.errors import UserError, excerpt


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        name: as in ``--card``.
        memory_gib: memory in GiB, as torch sees it.
        capability: compute capability, major and minor.
        tflops: TFLOP/s that large products in 16 bits reach; None if unknown.
        gb_per_s: GB/s that its memory reaches; None if unknown.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]
    tflops: float | None = None
    gb_per_s: float | None = None


CARDS = (
    # Memory: Colab, torch 2.11. Rates: cuBLAS fp16 4096^3 under its cap of 70 W (NVIDIA's forum, topic 264462: 24;
    # another measured 20.4); data sheet 65 and 320.
    Card("T4", 14.56, (7, 5), 24, 250),
    # Memory: 22.03 to 22.17 seen in logs. Data sheet 121 and 300; half of the FLOP/s, for it is capped at 72 W.
    Card("L4", 22.03, (8, 9), 60, 240),
    # Memory: 21.988, a log of Unsloth 2024.8. Data sheet 70 and 600.
    Card("A10G", 21.99, (8, 6), 52, 480),
    # Memory: GaoLii/DSP#10. Data sheet 71 and 936.
    Card("RTX 3090", 23.70, (8, 6), 53, 750),
    # Memory: ali-vilab/VGen#104. Data sheet 165 and 1008.
    Card("RTX 4090", 23.64, (8, 9), 124, 805),
    # Memory: TianheWu/CoSeR#10 (39.50). Data sheet 312 and 1555; 230 agrees with LLaMA-Factory's tokens/s.
    Card("A100 40GB", 39.50, (8, 0), 230, 1320),
    # Memory: vllm-project/vllm#4408 (79.15). Data sheet 312 and 2039.
    Card("A100 80GB", 79.15, (8, 0), 230, 1730),
    # Memory: as an A100 80GB, not seen in a log. SXM; data sheet 989 and 3350.
    Card("H100", 79.15, (9, 0), 740, 2850),
    # Memory: 139.72 to 139.81 seen in logs. Rates: a project's estimate; data sheet 989 and 4800.
    Card("H200", 139.72, (9, 0), 790, 4300),
)
DEFAULT = CARDS[0]


def find_card(name: str) -> Card:
    """The card called ``name``: ``t4``, ``Tesla T4``, ``a100-80``, ``NVIDIA GeForce RTX 4090``.

    Args:
        name: in any spelling; of an A100 without a size, the smaller one is meant.

    Raises:
        UserError: it is not in the table.
    """
    words = _words_of_name(name)
    for card in sorted(CARDS, key=lambda card: -len(card.name)):
        wanted = _words_of_name(card.name)
        if wanted <= words or wanted - {"rtx"} <= words:
            return card
    if "a100" in words:  # without a size, the smaller one
        return next(card for card in CARDS if card.name == "A100 40GB")
    raise UserError(
        f"no card {excerpt(name)} in the table",
        option="gpu",
        remedy=f"there are {', '.join(card.name for card in CARDS)}; give --gpu-gib N for another",
    )


def _words_of_name(name: str) -> set[str]:
    words = re.findall(r"[a-z]*\d+[a-z]*|[a-z]+", name.lower())
    return {re.sub(r"^(40|80)(gb?)?$", r"\1gb", re.sub(r"^rtx(\d)", r"\1", word)) for word in words}
