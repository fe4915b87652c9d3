"""What the optimizers and schedules promise: the factor at each step, a step of each optimizer, honest counts."""

from typing import get_args

import bitsandbytes  # noqa: F401  # the first import warns of torch's own, which pytest.warns would pass on
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.model.optimizer import (
    OPTIMIZERS,
    OptimizerName,
    forget,
    learning_rate_factor,
    make_schedule,
    num_applied,
)

NAMES = [*OPTIMIZERS]
WHERE_IT_WORKS = [
    pytest.param(name, "cuda", marks=pytest.mark.gpu) if how.is_paged else pytest.param(name, "cpu")
    for name, how in OPTIMIZERS.items()
]
ON_CPU = [name for name, how in OPTIMIZERS.items() if not how.is_paged]
SCHEDULES = ["constant", "linear", "cosine"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.8535534, 0.5, 0.1464466, 0, 0]),
    ],
)
def test_factors_of_seven_steps_with_three_of_warm_up(name, expected):
    factors = [learning_rate_factor(name, step, num_steps=7, num_warmup=3) for step in range(9)]
    assert factors == pytest.approx(expected, abs=1e-7)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert [learning_rate_factor(name, 0, 10, 0) for name in SCHEDULES] == [1, 1, 1]


@given(st.sampled_from(SCHEDULES), st.integers(0, 300), st.integers(1, 200), st.floats(0, 1))
def test_a_factor_is_a_share(name, step, num_steps, warmup):
    assert 0 <= learning_rate_factor(name, step, num_steps, round(warmup * num_steps)) <= 1


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 200), st.floats(0, 0.99))
def test_after_the_warm_up_the_rate_only_falls_to_zero(name, num_steps, warmup):
    num_warmup = round(warmup * num_steps)
    after = [learning_rate_factor(name, step, num_steps, num_warmup) for step in range(num_warmup, num_steps + 1)]
    assert after == sorted(after, reverse=True)
    if num_warmup < num_steps:
        assert after[-1] == pytest.approx(0, abs=1e-12)


def test_the_schedule_moves_the_rate_of_each_step():
    optimizer = OPTIMIZERS["adamw"].make([torch.nn.Parameter(torch.ones(3))], lr=0.2, weight_decay=0.0)
    schedule = make_schedule("linear", optimizer, num_steps=6, warmup_ratio=0.1)  # a warm-up of one step
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1, 0.2, 0.16, 0.12, 0.08, 0.04])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_each_name_has_its_entry_and_what_it_names_is_there():
    assert [*get_args(OptimizerName)] == NAMES
    assert {"adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"} <= {*NAMES}  # which configurations name
    assert {name for one in OPTIMIZERS.values() for name in one.smaller} <= {*NAMES}


@pytest.mark.parametrize(("name", "device"), WHERE_IT_WORKS)
def test_what_is_forgotten_leaves_no_trace_and_keeps_its_memory(name, device):
    check_forgetting(OPTIMIZERS[name].make, device)


@pytest.mark.parametrize("kind", ["NAdam", "RAdam", "Adamax"])
def test_a_scripts_own_optimizer_forgets_as_well(kind):
    check_forgetting(getattr(torch.optim, kind), "cpu")


def check_forgetting(make, device):
    ends, pointers = [], []
    for tries in (0, 2):
        weight = torch.nn.Parameter(torch.ones(512, 256, device=device))  # what is paged has 100,000 elements
        optimizer = make([weight], lr=0.1, weight_decay=0.5)
        for turn in range(tries + 1):
            with torch.no_grad():
                weight.fill_(1.0)
            forget(optimizer)
            for step in range(2):
                torch.manual_seed(step + turn - tries)
                weight.grad = torch.randn(512, 256).to(device)
                optimizer.step()
            pointers.append({value.data_ptr() for value in optimizer.state[weight].values() if torch.is_tensor(value)})
        ends.append(weight.detach().cpu())
        assert num_applied(optimizer) == 2
    assert torch.equal(*ends)
    assert pointers[1] == pointers[2] == pointers[3]


def steps(name, device="cpu", num_steps=1, weight_decay=0.5):
    weight = torch.nn.Parameter(torch.ones(64, 128, device=device))  # 8-bit state from 4,096 elements on
    optimizer = OPTIMIZERS[name].make([weight], lr=0.1, weight_decay=weight_decay)
    for _ in range(num_steps):
        weight.grad = torch.full_like(weight, 3.0)
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize(("name", "device"), WHERE_IT_WORKS)
def test_a_first_step_decays_beside_what_the_gradient_asks(name, device):
    plain, decayed = (steps(name, device, weight_decay=decay)[0][0, 0].item() for decay in (0.0, 0.5))
    assert plain < 1
    # Decay is lr * 0.5; bitsandbytes' CUDA kernels decay after the step.
    assert decayed == pytest.approx(plain * (1 - 0.1 * 0.5) if device == "cuda" else plain - 0.1 * 0.5, abs=1e-3)
    if "adamw" in name:  # whose first step is lr * the gradient's sign
        assert plain == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_without_a_gpu_a_paged_optimizer_says_that_it_does_not_page(name):
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        weight = torch.nn.Parameter(torch.ones(400, 400))  # paged from 100,000 elements on
        optimizer = OPTIMIZERS[name].make([weight], lr=0.1, weight_decay=0.5)
        weight.grad = torch.full_like(weight, 3.0)
        optimizer.step()
    assert torch.allclose(weight, torch.full_like(weight, 0.85), atol=1e-3)
    assert num_applied(optimizer) == 1


@pytest.mark.parametrize("name", [name for name in ON_CPU if OPTIMIZERS[name].in_8_bits])
def test_an_8_bit_optimizer_keeps_its_state_in_8_bits(name):
    weight, optimizer = steps(name)
    assert optimizer.state[weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ON_CPU)
def test_updates_are_counted(name):
    _, optimizer = steps(name, num_steps=0)
    assert num_applied(optimizer) == 0
    _, optimizer = steps(name, num_steps=5)
    assert num_applied(optimizer) == 5


@pytest.mark.parametrize("name", ON_CPU)
def test_a_step_that_the_gradient_scaler_skips_is_not_counted(name):
    weight, optimizer = steps(name, num_steps=2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.tensor(1.0))
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert num_applied(optimizer) == 2
    assert torch.equal(weight, before)
    weight.grad = torch.full_like(weight, 3.0)
    scaler.step(optimizer)
    assert num_applied(optimizer) == 3


def test_clipping_in_fp16_is_possible():
    """Lightning refuses to clip the gradients of a fused AdamW under a GradScaler."""
    _, optimizer = steps("adamw")
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
