"""Owns the optimizer and the learning rate over the steps. Knows parameters, not what they belong to."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_qlora.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Schedule = Literal["constant", "linear", "cosine"]


def check_optimizer(name: OptimizerName, on_gpu: bool) -> None:
    """Raises UserError for an optimizer that this device can't use."""
    if name.startswith("paged") and not on_gpu:
        raise UserError(
            f"{name} pages a GPU's memory, and there is no GPU",
            option="model.optimizer",
            remedy="take adamw or adamw_8bit",
        )


def make_optimizer(
    name: OptimizerName, parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019): torch's, or bitsandbytes' with a smaller state.

    Args:
        name: ``_8bit`` keeps the state in 8 bits, ``paged_`` moves it to the host when memory is short.
        parameters: fp32.
        learning_rate: the peak of the schedule.
        weight_decay: share of the weights, times the learning rate, that each step takes off.
    """
    if name == "adamw":
        # Not fused: it unscales gradients itself, which Lightning refuses with clipping in fp16.
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, foreach=True)
    from bitsandbytes import optim

    kind = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return kind[name](parameters, lr=learning_rate, weight_decay=weight_decay)  # type: ignore[no-any-return]


def make_schedule(name: Schedule, optimizer: torch.optim.Optimizer, num_steps: int, warmup_ratio: float) -> LambdaLR:
    """The factor on the learning rate: a linear warm-up, then ``name`` down to 0 at the end.

    Args:
        name: of the schedule.
        optimizer: whose learning rate is the peak.
        num_steps: optimizer steps of the run.
        warmup_ratio: share of these, rounded up, in which the rate rises.
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    return LambdaLR(optimizer, lambda step: learning_rate_factor(name, step, num_steps, num_warmup))


def learning_rate_factor(name: Schedule, step: int, num_steps: int, num_warmup: int) -> float:
    """The factor, up to 1, for the optimizer step after the first ``step``; the first ``num_warmup`` steps rise."""
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    done = min((step - num_warmup) / max(num_steps - num_warmup, 1), 1.0)
    if name == "linear":
        return 1.0 - done
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Reset the state to before the first step, in the same memory: bitsandbytes never frees paged memory."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, int):
                state[name] = 0
            elif not name.startswith("qmap"):  # the code book of 8-bit states
                value.zero_()


def num_applied(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates that changed the weights, without those skipped by a GradScaler."""
    for state in optimizer.state.values():
        return int(state["step"])
    return 0
