"""The comparison's ratios: TRL's best is the quicker of its settings, and what was not measured has none."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compare


def test_the_best_of_trl_is_its_quickest():
    speeds = {"lit_qlora": 600.0, "trl_default": 100.0, "trl_grouped": 150.0, "trl_packed": 240.0, "unsloth": 0}
    assert compare._ratios(speeds) == {"ratio_to_trl_default": 6.0, "ratio_to_trl_best": 2.5}
    assert compare._ratios(speeds | {"trl_packed": 0})["ratio_to_trl_best"] == 4.0
    assert compare._ratios({"trl_default": 100.0}) == {}
