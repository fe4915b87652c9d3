"""What a fit takes of the disk, by formula."""

import pytest

from lit_qlora.forecast.host import run_folder_bytes


@pytest.mark.parametrize(("states", "expected"), [(1, 3_600), (2, 4_800), (3, 6_000)])
def test_a_run_folder_grows_with_the_optimizers_state(states, expected):
    assert run_folder_bytes(100, 2, states) == expected
