"""Each micro-batch goes to one device, and no device has much more to do than another."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.devices.dealing import FIXED_TOKENS, deal, deal_steps, efficiency

SIZES = st.lists(st.integers(1, 4096), min_size=1, max_size=40)


def loads(sizes: list[int], devices: list[int], num_devices: int) -> list[int]:
    found = [0] * num_devices
    for size, device in zip(sizes, devices, strict=True):
        found[device] += size + FIXED_TOKENS
    return found


@given(SIZES, st.integers(1, 9))
def test_the_slowest_device_has_at_most_the_mean_and_a_part_of_one_micro_batch(sizes: list[int], count: int) -> None:
    found = loads(sizes, deal(sizes, count), count)
    most = max(sizes) + FIXED_TOKENS
    assert max(found) * count <= sum(found) + most * (count - 1)  # in whole numbers: no rounding


@given(SIZES, st.integers(1, 9))
def test_no_device_is_idle_while_another_has_two(sizes: list[int], count: int) -> None:
    shares = Counter(deal(sizes, count))
    assert len(shares) == min(count, len(sizes))
    assert {*shares} <= {*range(count)}


@given(SIZES, st.integers(1, 5))
def test_it_is_the_same_in_every_process(sizes: list[int], count: int) -> None:
    assert deal(sizes, count) == deal([*sizes], count)


@given(SIZES, st.integers(1, 9), st.integers(1, 5))
def test_each_step_is_dealt_by_itself(sizes: list[int], at_once: int, count: int) -> None:
    whole = deal_steps(sizes, at_once, count)
    assert len(whole) == len(sizes)
    for start in range(0, len(sizes), at_once):
        assert whole[start : start + at_once] == deal(sizes[start : start + at_once], count)


@given(SIZES, st.integers(1, 9), st.integers(1, 5))
def test_the_efficiency_is_a_share_and_of_one_device_all(sizes: list[int], at_once: int, count: int) -> None:
    assert efficiency(sizes, at_once, 1) == 1
    assert 1 / count - 1e-9 <= efficiency(sizes, at_once, count) <= 1


def test_the_largest_are_dealt_first() -> None:
    assert deal([100, 900, 300, 500], 2) == [0, 0, 1, 1]
    assert deal([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert efficiency([1000, 1000, 1000], 3, 2) == 0.75


def test_one_micro_batch_per_device_wastes_more_than_two() -> None:
    """Lengths as of Guanaco's rows, four rows to a micro-batch."""
    sizes = [4 * (100 + (37 * at * at) % 900) for at in range(400)]
    two, four, eight = (efficiency(sizes, at_once, 2) for at_once in (2, 4, 8))
    assert two < 0.85 and 0.9 < four < eight
