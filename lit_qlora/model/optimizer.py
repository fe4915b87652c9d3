"""Owns the optimizers, with what their state takes, and the learning rate over the steps.

Each is an entry in `OPTIMIZERS`; no other module names one. Knows parameters, not what they belong to.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_qlora.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Schedule = Literal["constant", "linear", "cosine"]


class OptimizerKind(NamedTuple):
    """How an optimizer is made, and what its state takes.

    Args:
        make: from parameters, ``lr`` and ``weight_decay``.
        smaller: names of those that take less of a card, the mildest change first.
        states: values that it keeps per weight.
        in_8_bits: True if these take 8 bits, and not 32.
        is_paged: True if they move to the host's memory when the card's runs short.
        scratch: fp32 values per weight, of all tensors, that an update holds beside its state.
    """

    make: Callable[..., torch.optim.Optimizer]
    smaller: tuple[str, ...] = ()
    states: int = 2
    in_8_bits: bool = False
    is_paged: bool = False
    scratch: int = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of the state per weight of a large tensor, without scales."""
        return self.states * (1 if self.in_8_bits else 4)


def _of_bitsandbytes(kind: str, *given: Any, **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes import optim

    return getattr(optim, kind)(*given, **options)  # type: ignore[no-any-return]


OPTIMIZERS = {
    # Not fused: it unscales gradients itself, which Lightning refuses with clipping in fp16.
    # It holds the roots of all second moments at once, where bitsandbytes works in place.
    "adamw": OptimizerKind(
        partial(torch.optim.AdamW, foreach=True), smaller=("adamw_8bit", "paged_adamw_8bit"), scratch=1
    ),
    "adamw_8bit": OptimizerKind(partial(_of_bitsandbytes, "AdamW8bit"), ("paged_adamw_8bit",), in_8_bits=True),
    # The 8-bit one that stays on the card takes more there.
    "paged_adamw": OptimizerKind(partial(_of_bitsandbytes, "PagedAdamW"), ("paged_adamw_8bit",), is_paged=True),
    "paged_adamw_8bit": OptimizerKind(partial(_of_bitsandbytes, "PagedAdamW8bit"), in_8_bits=True, is_paged=True),
}
"""The optimizers by the names of `OptimizerName`: AdamW (Loshchilov and Hutter, 2019)."""


def check_optimizer(name: OptimizerName, on_gpu: bool) -> None:
    """Check that a device can use an optimizer.

    Args:
        name: of the optimizer.
        on_gpu: True for a GPU, whose memory some page.

    Raises:
        UserError: it can't.
    """
    if OPTIMIZERS[name].is_paged and not on_gpu:
        raise UserError(
            f"{name} pages a GPU's memory, and there is no GPU",
            option="model.optimizer",
            remedy=f"take {' or '.join(one for one, kind in OPTIMIZERS.items() if not kind.is_paged)}",
        )


def make_schedule(name: Schedule, optimizer: torch.optim.Optimizer, num_steps: int, warmup_ratio: float) -> LambdaLR:
    """The factor on the learning rate: a linear warm-up, then ``name`` down to 0 at the end.

    Args:
        name: of the schedule.
        optimizer: optimizer whose learning rate is the peak.
        num_steps: optimizer steps of the run.
        warmup_ratio: share of these, rounded up, in which the rate rises.
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    return LambdaLR(optimizer, lambda step: learning_rate_factor(name, step, num_steps, num_warmup))


def learning_rate_factor(name: Schedule, step: int, num_steps: int, num_warmup: int) -> float:
    """The factor, up to 1, for the optimizer step after the first ``step``.

    Args:
        name: of the schedule.
        step: optimizer steps done.
        num_steps: of the run.
        num_warmup: the first steps, in which the rate rises.
    """
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    done = min((step - num_warmup) / max(num_steps - num_warmup, 1), 1.0)
    if name == "linear":
        return 1.0 - done
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Reset the state of ``optimizer`` to before the first step, in place: bitsandbytes never frees paged memory."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, int):
                state[name] = 0
            elif name == "mu_product":  # NAdam's, which a script may have
                value.fill_(1.0)
            elif not name.startswith("qmap"):  # the code book of 8-bit states
                value.zero_()


def num_applied(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates by ``optimizer`` that changed the weights, without those skipped by a GradScaler."""
    for state in optimizer.state.values():
        return int(state["step"])
    return 0
