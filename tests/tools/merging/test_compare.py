"""How far a merged model may be from base + adapter."""

import math

import pytest

from lit_qlora.errors import UserError
from lit_qlora.tools.merging.compare import Difference, check_rounding


def test_another_model_may_differ_as_far_as_its_logits_are_finite() -> None:
    check_rounding(Difference(0.25, 1.0, 9), "float16")
    check_rounding(Difference(900.0, 0.0, 9), "float16", is_trained=False)
    for greatest, is_trained, expected in (
        (0.26, True, "at most 0.25 in float16"),
        (math.nan, True, "at most 0.25 in float16"),
        (math.nan, False, "finite logits"),
    ):
        with pytest.raises(UserError) as caught:
            check_rounding(Difference(greatest, 0.5, 9), "float16", is_trained=is_trained)
        assert (caught.value.option, caught.value.remedy) == ("output", f"expected {expected}")
