"""What `answer_targets` promises: position t predicts the label at t + 1, and only learned labels count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities import move_data_to_device

from lit_qlora.batch import IGNORE_INDEX, Batch, answer_targets, split_batch

LABELS = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(
        st.lists(st.sampled_from([IGNORE_INDEX, 0, 1, 31999]), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


def test_the_label_after_a_position_is_its_target():
    labels = torch.tensor([[-100, -100, 7, 2], [-100, 9, -100, -100]])
    positions, targets = answer_targets(labels)
    assert positions.tolist() == [1, 2, 4]
    assert targets.tolist() == [7, 2, 9]


def test_a_first_label_is_never_a_target_not_even_of_the_row_before():
    positions, targets = answer_targets(torch.tensor([[5, -100], [6, -100], [7, -100]]))
    assert positions.tolist() == []
    assert targets.tolist() == []


def test_the_given_labels_stay_as_they_are():
    labels = torch.tensor([[1, 2, 3]])
    answer_targets(labels)
    assert labels.tolist() == [[1, 2, 3]]


def test_no_learned_label_gives_empty_int64():
    positions, targets = answer_targets(torch.full((2, 3), IGNORE_INDEX))
    assert (positions.shape, targets.shape) == ((0,), (0,))
    assert (positions.dtype, targets.dtype) == (torch.int64, torch.int64)


@given(LABELS)
def test_equals_a_plain_loop(rows):
    expected = [
        (row * len(labels) + column, labels[column + 1])
        for row, labels in enumerate(rows)
        for column in range(len(labels) - 1)
        if labels[column + 1] != IGNORE_INDEX
    ]
    positions, targets = answer_targets(torch.tensor(rows))
    assert list(zip(positions.tolist(), targets.tolist(), strict=True)) == expected


def test_halves_by_hand():
    ids = torch.tensor([[1, 2, 0], [3, 4, 5], [6, 7, 0]])
    batch = Batch(ids, torch.tensor([0, 3, 4, 6]), torch.tensor([2, 4, 5, 7]), (9, 8, 7), 7, 4)
    first, second = split_batch(batch)
    assert first.input_ids.tolist() == [[1, 2, 0]]
    assert (first.positions.tolist(), first.targets.tolist(), first.rows) == ([0], [2], (9,))
    assert second.input_ids.tolist() == [[3, 4, 5], [6, 7, 0]]
    assert (second.positions.tolist(), second.targets.tolist(), second.rows) == ([0, 1, 3], [4, 5, 7], (8, 7))
    assert (first.step_answer_tokens, second.step_answer_tokens) == (4, 4)
    assert (first.part, second.part) == ((0, 9), (3, 9))
    packed = Batch(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([0, 3]), torch.tensor([2, 5]), (9, 8), 5, 2, (2, 3))
    first, second = split_batch(packed)
    assert (first.input_ids.tolist(), first.lengths, first.positions.tolist()) == ([[1, 2]], (2,), [0])
    assert (second.input_ids.tolist(), second.lengths, second.positions.tolist()) == ([[3, 4, 5]], (3,), [1])
    assert (first.part, second.part) == ((0, 5), (2, 5))
    assert split_batch(first) == [first]


def a_batch(tokens):
    ids = torch.arange(3, 3 + tokens)[None] % 500
    return Batch(ids, *answer_targets(ids), rows=(4,), num_tokens=tokens, step_answer_tokens=2 * tokens)


def test_lightning_moves_a_batch_with_its_numbers_as_they_are():
    batch = a_batch(5)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert type(moved) is Batch
    assert {one.device.type for one in (moved.input_ids, moved.positions, moved.targets)} == {"meta"}
    assert (moved.rows, moved.num_tokens, moved.step_answer_tokens) == ((4,), 5, 10)


def test_a_batch_that_another_device_computes_is_not_moved():
    batch = a_batch(5)._replace(is_here=False)
    assert move_data_to_device(batch, torch.device("meta")) is batch


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [100, 20_000])
def test_on_a_gpu_a_batch_is_moved_without_waiting_for_it(tokens):
    batch, device = a_batch(tokens), torch.device("cuda", 0)
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second
    moved = move_data_to_device(batch, device)
    assert not torch.cuda.current_stream().query()
    for one, other in zip(moved[:3], batch[:3], strict=True):
        assert one.device == device
        assert torch.equal(one.cpu(), other)
