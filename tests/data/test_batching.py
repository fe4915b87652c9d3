"""Every row once per epoch, little padding, an order that two numbers restore, and one denominator per step."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.batching import BatchPlan, PlannedBatches, ResumableLoader, collate
from lit_qlora.devices.dealing import EVALUATED_AT_ONCE

ROOT = Path(__file__).parents[2]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=450)
PLANS = st.builds(BatchPlan, st.integers(1, 9)) | st.builds(BatchPlan, st.just(4), st.integers(1, 120), st.booleans())


def padded(batch, lengths, packed=False):
    return sum(lengths[row] for row in batch) if packed else len(batch) * max(lengths[row] for row in batch)


def flat(batches):
    return [row for batch in batches for row in batch]


@given(lengths=LENGTHS, plan=PLANS, seed=st.integers(), epoch=st.integers(0, 5))
def test_every_row_stands_in_one_batch(lengths, plan, seed, epoch):
    assert sorted(flat(plan.epoch(lengths, seed, epoch))) == list(range(len(lengths)))


@given(lengths=LENGTHS, plan=PLANS, seed=st.integers())
def test_every_epoch_has_as_many_batches(lengths, plan, seed):
    assert len({len(plan.epoch(lengths, seed, epoch)) for epoch in range(5)}) == 1


@given(lengths=LENGTHS, rows=st.integers(1, 9))
def test_batches_by_rows_are_full_but_for_one(lengths, rows):
    sizes = Counter(len(batch) for batch in BatchPlan(rows).epoch(lengths, 1, 0))
    rest = len(lengths) % rows
    assert sizes == Counter({rows: len(lengths) // rows} if not rest else {rows: len(lengths) // rows, rest: 1})


@given(lengths=LENGTHS, tokens=st.integers(1, 120), packed=st.booleans(), epoch=st.integers(0, 3))
def test_the_token_budget_holds_unless_one_row_alone_exceeds_it(lengths, tokens, packed, epoch):
    for batch in BatchPlan(4, tokens, packed).epoch(lengths, 1, epoch):
        assert padded(batch, lengths, packed) <= tokens or len(batch) == 1


def test_packing_leaves_the_least_room():
    batches = BatchPlan(4, 10, packed=True).epoch([6, 5, 5, 4, 3, 7], 1, 0)
    assert sorted(map(sorted, batches)) == [[0, 3], [1, 2], [4, 5]]


def test_packed_rows_stand_one_after_the_other_and_no_first_token_is_learned():
    examples = [(7, {"input_ids": [1, 5, 6], "labels": [1, 5, 6]}), (3, {"input_ids": [1, 8], "labels": [-100, 8]})]
    batch = collate(examples, 9, packed=True)
    assert batch.input_ids.tolist() == [[1, 5, 6, 1, 8]]
    assert (batch.positions.tolist(), batch.targets.tolist()) == ([0, 1, 3], [5, 6, 8])
    assert (batch.rows, batch.num_tokens, batch.step_answer_tokens, batch.lengths) == ((7, 3), 5, 9, (3, 2))


def test_the_token_budget_is_used():
    assert sorted(map(len, BatchPlan(1, 12).epoch([3] * 8, 1, 0))) == [4, 4]
    assert sorted(map(sorted, BatchPlan(1, 12).epoch([13, 6, 6, 1], 1, 0))) == [[0], [1, 2], [3]]


@given(lengths=LENGTHS, plan=PLANS, seed=st.integers(), epoch=st.integers(0, 5))
def test_the_largest_batch_comes_first(lengths, plan, seed, epoch):
    batches = plan.epoch(lengths, seed, epoch)
    assert padded(batches[0], lengths, plan.packed) == max(padded(batch, lengths, plan.packed) for batch in batches)


@given(lengths=LENGTHS, plan=PLANS, seed=st.integers(), epoch=st.integers(0, 5))
def test_the_order_is_a_function_of_seed_and_epoch(lengths, plan, seed, epoch):
    random.seed(0)
    first = plan.epoch(lengths, seed, epoch)
    random.seed(1)
    assert plan.epoch(lengths, seed, epoch) == first


@pytest.mark.parametrize("plan", [BatchPlan(4), BatchPlan(4, 200)])
def test_another_seed_and_another_epoch_are_other_orders(plan):
    lengths = [1 + index % 40 for index in range(400)]
    orders = [plan.epoch(lengths, seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 6
    assert len({str(sorted(map(sorted, order))) for order in orders}) == 6  # other batches, not only their order


def test_the_order_is_the_same_on_every_machine():
    # Written out once: a change here breaks the resume of every run under way.
    assert BatchPlan(2).epoch([5, 1, 4, 2, 3], 42, 0) == [[4, 2], [0], [1, 3]]
    assert BatchPlan(2, 6).epoch([5, 1, 4, 2, 3], 42, 0) == [[4, 3], [2], [0], [1]]


@pytest.mark.parametrize("plan", [BatchPlan(4), BatchPlan(4, 4096)])
def test_little_is_padding(plan):
    draw = random.Random(0)
    lengths = [max(1, min(1024, round(draw.lognormvariate(5.99, 0.8)))) for _ in range(2000)]  # e^5.99 = 400
    for epoch in range(2):
        places = sum(padded(batch, lengths) for batch in plan.epoch(lengths, 42, epoch))
        assert 1 - sum(lengths) / places < 0.03


def test_collate_pads_on_the_right_and_never_learns_padding():
    no = IGNORE_INDEX
    examples = [
        (7, {"input_ids": [1, 5, 6, 2], "labels": [no, no, 6, 2]}),
        (3, {"input_ids": [1, 9], "labels": [no, 9]}),
    ]
    batch = collate(examples, step_answer_tokens=11)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 9, 0, 0]]
    assert batch.input_ids.dtype == torch.int64
    assert batch.positions.tolist() == [1, 2, 4]  # 4 is the second row's first place
    assert batch.targets.tolist() == [6, 2, 9]
    assert (batch.rows, batch.num_tokens, batch.step_answer_tokens) == ((7, 3), 6, 11)


def test_an_eos_at_the_end_is_learned_though_padding_follows():
    no = IGNORE_INDEX
    batch = collate([(0, {"input_ids": [1, 2], "labels": [no, 2]}), (1, {"input_ids": [1] * 5, "labels": [no] * 5})], 1)
    assert (batch.positions.tolist(), batch.targets.tolist()) == ([0], [2])


def examples(sizes):
    """Rows of these lengths; the first half of each is a prompt."""
    return [
        {
            "input_ids": [row * 100 + place for place in range(size)],
            "labels": [IGNORE_INDEX] * (size // 2 + 1) + [row * 100 + place for place in range(size // 2 + 1, size)],
        }
        for row, size in enumerate(sizes)
    ]


def rows_of(sizes, answer_tokens=None):
    answers = answer_tokens or [size - size // 2 - 1 for size in sizes]
    return SimpleNamespace(examples=examples(sizes), lengths=sizes, answer_tokens=answers)


SIZES = [3 + (7 * index) % 11 for index in range(23)]


def loader(sizes=SIZES, rows=2, **options):
    return ResumableLoader(rows_of(sizes), lambda epoch: BatchPlan(rows).epoch(sizes, 42, epoch), **options)


def plain(batch):
    """What can be compared with ==."""
    return tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in batch)


def walk(one, epochs):
    """(the state after it, the batch) of each batch."""
    return [(one.state_dict(), plain(batch)) for _ in range(epochs) for batch in one]


def test_it_resumes_from_every_place_with_the_very_same_batches():
    whole = walk(loader(accumulate=3), 3)
    assert len(whole) == 36
    for place, (state, _) in enumerate(whole[:-1]):
        resumed = loader(accumulate=3)
        resumed.load_state_dict(state)
        assert walk(resumed, 3 - state["epoch"]) == whole[place + 1 :], place


def test_workers_hand_out_the_same_batches_and_states():
    whole = walk(loader(accumulate=3), 3)
    assert walk(loader(accumulate=3, num_workers=2), 3) == whole
    for place in range(0, 35, 5):
        state = whole[place][0]
        resumed = loader(accumulate=3, num_workers=2)
        resumed.load_state_dict(state)
        assert walk(resumed, 1) == [(s, b) for s, b in whole[place + 1 : place + 13] if _same_epoch(state, s)], place


def _same_epoch(start, state):
    """True if the batch before ``state`` is of the epoch in which ``start`` stands."""
    return (state["epoch"], state["batches"]) <= (start["epoch"] + 1, 0)


def test_batches_are_typed_with_workers_too():
    (batch, *_) = loader(num_workers=1)
    assert isinstance(batch.rows, tuple)
    assert batch.input_ids.dtype == torch.int64


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="this system does not show its processes")
def test_workers_end_with_a_parent_that_is_killed():
    here, there = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=_begin_workers, args=[there])
    parent.start()
    there.close()
    workers = here.recv()
    assert len(workers) == 2 and all(map(_lives, workers))
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 30
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [pid for pid in workers if _lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.parametrize("then", ["", "held = [batches]; held.append(held); del batches, held; gc.collect()"])
def test_batches_that_nobody_took_to_their_end_hold_no_process_up(then):
    """Be they there at its end, or gone in a cycle of references, such as an error's with the frames of a Trainer."""
    code = "import gc\nfrom tests.data.test_batching import loader\n"
    code += f"batches = iter(loader([3] * 3000, num_workers=1))\nprint(next(batches).input_ids.shape)\n{then}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def _begin_workers(there):
    """Starts two workers with more to do than anybody takes from them; sends their process ids."""
    batches = iter(loader([3] * 3000, num_workers=2))
    next(batches)
    there.send([child.pid for child in multiprocessing.active_children()])
    time.sleep(60)


def _lives(pid):
    """True if the process ``pid`` runs; one that has ended and was not waited for yet doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_state_at_an_epochs_end_is_the_next_ones_start():
    states = [state for state, _ in walk(loader(), 2)]
    assert states[10:13] == [{"epoch": 0, "batches": 11}, {"epoch": 1, "batches": 0}, {"epoch": 1, "batches": 1}]
    assert states[-1] == {"epoch": 2, "batches": 0}


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.0, 12), (0.5, 6), (0.99, 11), (1, 1), (5, 5), (12, 12), (99, 12), (0, 0), (0.0, 0)]
)
def test_the_limit_is_a_number_or_a_share(limit, expected):
    one = loader(limit=limit)
    assert one.length == expected
    assert len(one) == 12
    if expected:
        assert [state for state, _ in walk(one, 2)][-1] == {"epoch": 2, "batches": 0}
    assert len(walk(loader(limit=limit), 1)) == expected


def test_a_limited_epoch_is_the_beginning_of_the_whole_one():
    assert [batch[3] for _, batch in walk(loader(limit=5), 1)] == [batch[3] for _, batch in walk(loader(), 1)[:5]]


@given(
    sizes=st.lists(st.integers(2, 9), min_size=8, max_size=30),
    devices=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    limit=st.integers(1, 10) | st.just(1.0),
    epoch=st.integers(0, 2),
)
def test_the_denominator_is_what_the_devices_learn_in_a_step(sizes, devices, accumulate, limit, epoch):
    parts = []
    for device in range(devices):
        one = loader(sizes, accumulate=accumulate, device_index=device, num_devices=devices, limit=limit)
        one.load_state_dict({"epoch": epoch, "batches": 0})
        parts.append(list(one))
    assert len({len(part) for part in parts}) == 1
    # A last window that is short has the sum of what it has.
    for start in range(0, len(parts[0]), accumulate):
        window = [batch for part in parts for batch in part[start : start + accumulate]]
        assert {batch.step_answer_tokens for batch in window} == {sum(len(batch.targets) for batch in window)}


def test_the_denominator_by_hand():
    rows = rows_of([9] * 5, [4, 40, 400, 4000, 40000])
    one = ResumableLoader(rows, lambda epoch: [[0], [1], [2], [3], [4]], accumulate=2)
    assert [batch.step_answer_tokens for batch in one] == [44, 44, 4400, 4400, 40000]


@given(
    devices=st.integers(1, 5), epoch=st.integers(0, 2), accumulate=st.integers(1, 6), packed=st.booleans(),
    done=st.integers(0, 11),
)  # fmt: skip
def test_devices_share_out_the_epoch(devices, epoch, accumulate, packed, done):
    """Each is handed every micro-batch in the order of one, and computes those that no other does."""
    place = {"epoch": epoch, "batches": done}
    seen = []
    for device in range(devices):
        options = {"device_index": device, "num_devices": devices, "packed": packed}
        one = loader(accumulate=accumulate, **options)
        one.load_state_dict(place)
        seen.append(list(one))
        assert one.state_dict() == {"epoch": epoch + 1, "batches": 0}
    whole = loader(accumulate=accumulate, packed=packed)
    whole.load_state_dict(place)
    for alone, *several in zip(whole, *seen, strict=True):
        ((device, here),) = ((device, batch) for device, batch in enumerate(several) if batch.is_here)
        assert plain(here._replace(device=-1)) == plain(alone)
        assert here.device == (device if devices > 1 else -1)
        for batch in several:
            assert (batch.rows, batch.num_tokens) == (alone.rows, alone.num_tokens)
            assert batch.input_ids.shape == alone.input_ids.shape
            assert batch.step_answer_tokens == alone.step_answer_tokens
            assert batch.is_here or not (len(batch.targets) or batch.input_ids.any())


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=30), devices=st.integers(1, 4), rows=st.integers(1, 4))
def test_an_evaluation_sees_every_row_once_over_all_devices(sizes, devices, rows):
    batches = BatchPlan(rows).epoch(sizes, 0, 0)
    seen = []
    steps, at_once = [[batch] for batch in batches], EVALUATED_AT_ONCE * devices
    for device in range(devices):
        one = PlannedBatches(rows_of(sizes), steps, at_once, device_index=device, num_devices=devices)
        assert len(one) == len(list(one)) == len(batches)  # as many for each, or a limit would be another one
        seen += [row for batch in one for row in batch.rows if batch.is_here]
    assert sorted(seen) == list(range(len(sizes)))


def test_an_evaluation_is_the_same_each_time():
    one = PlannedBatches(rows_of(SIZES), [[batch] for batch in BatchPlan(2).epoch(SIZES, 0, 0)], EVALUATED_AT_ONCE)
    assert [plain(batch) for batch in one] == [plain(batch) for batch in one]
    assert all(batch.step_answer_tokens == len(batch.targets) for batch in one)


def test_neighbours_in_a_batch_are_of_like_length():
    lengths = [1 + index % 40 for index in range(400)]
    for batch in BatchPlan(4).epoch(lengths, 1, 0):
        assert all(lengths[first] <= lengths[second] for first, second in pairwise(batch))
