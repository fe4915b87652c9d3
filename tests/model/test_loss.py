"""What the chunked loss promises: the plain cross entropy's value and gradient, without its logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_qlora.model.loss import summed_cross_entropy


def example(num_rows, width=16, vocabulary=50, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=draw)
    head = torch.randn(vocabulary, width, generator=draw)
    ids = torch.randint(vocabulary, (num_rows,), generator=draw)
    return hidden, head, ids


def relative_error(value, expected):
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 38, 1024])
def test_equals_torch_in_value_and_gradient(chunk_rows):
    hidden, head, ids = example(37)
    expected_hidden = hidden.clone().requires_grad_()
    expected = cross_entropy(expected_hidden @ head.T, ids, reduction="sum")
    expected.backward()
    hidden.requires_grad_()
    loss, _ = summed_cross_entropy(hidden, head, ids, chunk_rows)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(hidden.grad, expected_hidden.grad) < 1e-6


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 1000), st.sampled_from([0.01, 1.0, 100.0]))
def test_equals_torch_whatever_the_sizes(num_rows, chunk_rows, seed, scale):
    hidden, head, ids = example(num_rows, seed=seed)
    hidden *= scale
    expected = cross_entropy((hidden @ head.T).double(), ids, reduction="sum").item()
    loss, _ = summed_cross_entropy(hidden, head, ids, chunk_rows)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_the_gradient_is_scaled_by_what_comes_back():
    hidden, head, ids = example(9)
    once = hidden.clone().requires_grad_()
    summed_cross_entropy(once, head, ids)[0].backward()
    thrice = hidden.clone().requires_grad_()
    (3 * summed_cross_entropy(thrice, head, ids)[0]).backward()
    assert torch.equal(thrice.grad, 3 * once.grad)


def test_no_rows_give_zero_and_an_empty_gradient():
    hidden, head, ids = example(0)
    hidden.requires_grad_()
    loss, num_correct = summed_cross_entropy(hidden, head, ids)
    loss.backward()
    assert (loss.item(), num_correct.item()) == (0.0, 0)
    assert hidden.grad.shape == (0, 16)


@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
def test_num_correct_counts_the_likeliest(chunk_rows):
    hidden, head, ids = example(200, vocabulary=5)
    likeliest = (hidden @ head.T).argmax(dim=1)
    _, num_correct = summed_cross_entropy(hidden, head, ids, chunk_rows)
    assert num_correct.dtype == torch.int64
    assert num_correct.item() == (likeliest == ids).sum().item()
    assert 0 < num_correct.item() < 200


def test_the_head_gets_no_gradient():
    hidden, head, ids = example(3)
    hidden.requires_grad_()
    head.requires_grad_()
    summed_cross_entropy(hidden, head, ids)[0].backward()
    assert head.grad is None


class Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives, and counts the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.num_products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        self.num_products += func == torch.ops.aten.mm.default
        return out


def test_no_tensor_is_larger_than_one_chunk_of_logits():
    hidden, head, ids = example(64, width=8, vocabulary=100)
    hidden.requires_grad_()
    with Watch() as watch:
        summed_cross_entropy(hidden, head, ids, 10)[0].backward()
    assert watch.largest == 10 * 100


def test_logits_are_computed_once():
    hidden, head, ids = example(64)
    hidden.requires_grad_()
    with Watch() as watch:
        summed_cross_entropy(hidden, head, ids, 32)[0].backward()
    assert watch.num_products == 2 * 2  # of each chunk, the logits and the gradient


def test_no_gradient_is_formed_without_grad():
    hidden, head, ids = example(6)
    hidden.requires_grad_()
    with torch.no_grad(), Watch() as watch:
        loss, _ = summed_cross_entropy(hidden, head, ids, 2)
    assert not loss.requires_grad
    assert watch.num_products == 3  # of each chunk, the logits alone


# In fp16, as on a T4. Entries of softmax near 1 / 32,000 are where it is decided.

ROWS, WIDTH, VOCABULARY, SCALE = 2048, 16, 32_000, 65_536.0


@pytest.fixture(scope="module")
def half():
    """fp16 inputs, and the exact gradient of the mean loss times the loss scale, in fp64."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=draw).half()
    # All tokens of a head have something in common, which only the sum over all of softmax cancels.
    common = torch.randn(WIDTH, generator=draw)
    head = (0.05 * (torch.randn(VOCABULARY, WIDTH, generator=draw) + common)).half()
    ids = torch.randint(VOCABULARY, (ROWS,), generator=draw)
    exact = []
    for rows, targets in zip(hidden.split(256), ids.split(256), strict=True):
        softmax = (rows.float() @ head.float().T).softmax(dim=1)
        softmax[torch.arange(256), targets] -= 1
        exact.append(softmax.double() @ head.double() * (SCALE / ROWS))
    return hidden, head, ids, torch.cat(exact)


def test_in_fp16_the_scaled_gradient_is_close_to_fp64(half):
    hidden, head, ids, exact = half
    hidden = hidden.clone().requires_grad_()
    loss, _ = summed_cross_entropy(hidden, head, ids)
    loss.backward(torch.tensor(SCALE / ROWS))
    assert hidden.grad.dtype == torch.float16
    assert relative_error(hidden.grad, exact) < 1e-3


def test_in_fp16_a_gradient_of_the_mean_would_have_flushed_to_zero(half):
    """Why the gradient is kept for the sum: divided by N first, most of it is below the smallest fp16."""
    hidden, head, ids, exact = half
    mean_reduced = []
    for rows, targets in zip(hidden.split(256), ids.split(256), strict=True):
        softmax = (rows.float() @ head.float().T).softmax(dim=1)
        softmax[torch.arange(256), targets] -= 1
        mean_reduced.append((softmax / ROWS).half() @ head)
    assert relative_error(torch.cat(mean_reduced).float() * SCALE, exact) > 1e-2


def test_in_fp16_a_loss_scale_of_65536_does_not_overflow():
    hidden, head, ids = example(40)
    hidden = hidden.half().requires_grad_()
    loss, _ = summed_cross_entropy(hidden, (0.05 * head).half(), ids)
    (loss * SCALE).backward()  # 65,536 itself is infinite in fp16
    assert loss.dtype == torch.float32
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().max() > 100
