"""Calculate where more cards stop paying: replicas of a 7B's rank-16 adapter, from one machine of 8 cards to 128.

    python benchmarks/many_cards.py                  # the tables in docs/several-devices.md; a few seconds, no GPU
    python benchmarks/many_cards.py --gpu t4 --network-gb-per-s 1.2

Nothing here is measured. A step's micro-batches are dealt by the project's own rule, by lengths as Guanaco's; their
time is the forecast's for the card, at `words.REACHED` of its roofline; an all-reduce is a ring's between machines of 8
cards, each with one network link, and as good as free inside of one. Each process goes through all micro-batches of a
step, also those of other cards, and starts its own in between: whichever of card and host takes longer decides. In
the first table the step stays, and so what is learned; in the second it grows with the cards, and beside it is what
is left of the steps of an epoch of Guanaco's 9,846 conversations.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

# ruff: noqa: E402
from asked import above_0

from lit_qlora.data.batching import BatchPlan, sizes_of
from lit_qlora.devices.dealing import FIXED_TOKENS, efficiency
from lit_qlora.errors import UserError
from lit_qlora.forecast import words
from lit_qlora.forecast.cards import find_card
from lit_qlora.forecast.foresee import Forecast, Rows, guanaco_lengths
from lit_qlora.model.lora import Lora
from lit_qlora.model.shape import LLAMA_2_SIZES, Shape

ROWS, LONGEST, TOKENS, PER_MACHINE = 9846, 1024, 2048, 8
CARDS = (8, 32, 128, 1024)
SHARES = (1, 4)
"""Numbers of micro-batches in a step, per card."""
SAME_CARDS, SAME_STEPS = (2, 4, 8, 16, 64), (4, 16, 64)
HOST_S = 1e-3
"""Seconds that a process takes for a micro-batch of another card: 0.7 ms, by hand, on one core of a busy Intel Xeon."""
STEPS = 8
"""Number of steps over which a cell's dealing is averaged."""


class Costs(NamedTuple):
    """What a step costs on one card and one network.

    Args:
        per_token: Seconds per token of one card.
        num_bytes: Bytes of an adapter's gradients.
        network_gb_per_s: Rate of a machine's network link, in GB/s.
    """

    per_token: float
    num_bytes: int
    network_gb_per_s: float


class Found(NamedTuple):
    """What comes of a step on several cards.

    Args:
        dealing: Share of the time that a card works if only the dealing of micro-batches makes it wait.
        exchange_s: Seconds of the gradients' all-reduce.
        share: Share of the time that a card works, with the exchange.
        tokens_per_s: Tokens per second of all cards.
    """

    dealing: float
    exchange_s: float
    share: float
    tokens_per_s: float


def forecast(gpu: str) -> Forecast:
    """The forecast for one card, which ``gpu`` names."""
    return Forecast(
        shape=Shape.of(LLAMA_2_SIZES["7b"]), card=find_card(gpu), rows=Rows(guanaco_lengths(ROWS)),
        lora=Lora(16, 16, 0.0, "all-linear", False, False), precision="bf16-mixed",
        plan=BatchPlan(4, TOKENS), max_length=LONGEST,
    )  # fmt: skip


def sizes(count: int) -> list[int]:
    """Tokens of at least ``count`` micro-batches of rows as long as Guanaco's."""
    lengths = [min(length, LONGEST) for length in guanaco_lengths(ROWS)]
    found: list[int] = []
    for epoch in range(10_000):
        if len(found) >= count:
            break
        found += sizes_of(BatchPlan(4, TOKENS).epoch(lengths, 42, epoch), lengths, packed=False)
    return found[:count]


def costs(gpu: str, network_gb_per_s: float) -> Costs:
    """What a step costs, by the forecast for a card.

    Args:
        gpu: The card, as ``plan --gpu`` names it.
        network_gb_per_s: Rate of a machine's network link, in GB/s.
    """
    one = forecast(gpu)
    assert one.hours is not None
    per_token = one.hours / words.REACHED * 3600 / one.epoch.padded_tokens
    return Costs(per_token, 4 * sum(one.step.lora_tensors), network_gb_per_s)


def find(micro_batches: int, cards: int, per: Costs) -> Found:
    """Calculate the speed of a step on several cards.

    Args:
        micro_batches: Number of micro-batches in a step.
        cards: Number of cards.
        per: Costs on one of them.
    """
    dealt = sizes(micro_batches * STEPS)
    dealing = efficiency(dealt, micro_batches, cards)
    computes = sum(size + FIXED_TOKENS for size in dealt) / STEPS * per.per_token / (cards * dealing)
    machines = math.ceil(cards / PER_MACHINE)
    waits = 2 * per.num_bytes * (machines - 1) / machines / (per.network_gb_per_s * 1e9)
    whole = max(computes, micro_batches * HOST_S) + waits
    return Found(dealing, waits, dealing * computes / whole, sum(dealt) / STEPS / whole)


def same_step(per: Costs) -> Iterator[str]:
    """Lines of a table for steps of the same size: how many times as fast several cards of costs ``per`` are as one."""
    yield f"| micro-batches of a step | conversations | {' | '.join(f'{count} cards' for count in SAME_CARDS)} |"
    yield "|---" * (len(SAME_CARDS) + 2) + "|"
    rows = ROWS / forecast("a100-80").epoch.num_micro_batches
    for micro_batches in SAME_STEPS:
        times = [count * find(micro_batches, count, per).share if count <= micro_batches else 0 for count in SAME_CARDS]
        shown = " | ".join(f"{one:.1f}" if one else "refused" for one in times)
        yield f"| {micro_batches} | {micro_batches * rows:.0f} | {shown} |"


def growing_step(per: Costs) -> Iterator[str]:
    """Lines of a table for steps that grow with the number of cards of costs ``per``."""
    yield "| cards | micro-batches of a step | dealing | all-reduce | each card works | tokens/s | steps per epoch |"
    yield "|---" * 7 + "|"
    available = forecast("a100-80").epoch.num_micro_batches
    for cards in CARDS:
        for share in SHARES:
            found, left = find(cards * share, cards, per), available / (cards * share)
            yield (
                f"| {cards:,} | {cards * share:,} | {found.dealing:.0%} | {1000 * found.exchange_s:.0f} ms | "
                f"{found.share:.0%} | {found.tokens_per_s:,.0f} | {f'{left:,.0f}' if left >= 1 else 'none'} |"
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="a100-80", help="a card of the forecast's table")
    parser.add_argument("--network-gb-per-s", type=above_0, default=12.5, help="of each machine, in one direction")
    options = parser.parse_args()
    try:
        per = costs(options.gpu, options.network_gb_per_s)
    except UserError as error:
        parser.error(str(error))
    print("\n".join([*same_step(per), "", *growing_step(per)]))


if __name__ == "__main__":
    main()
