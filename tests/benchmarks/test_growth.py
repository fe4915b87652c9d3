"""The measurement of growth: its steps run on a CPU, and its tables say what was measured and what was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import growth
import pytest

BENCHMARKS = Path(growth.__file__).parent


@pytest.mark.slow
def test_the_steps_of_a_few_settings_on_the_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "growth.py"), "--cpu", "--steps", "1", "--output", str(tmp_path)]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = done.stdout.strip().split("\n")
    assert [line.split(" | ")[:3] for line in table[2:]] == [
        ["| 32 x 2", "4", "0"], ["| 64 x 1", "4", "1"], ["| 32 x 1", "8", "0"],
    ]  # fmt: skip
    assert all(line.count("|") == 9 and line.count("not measured") == 2 for line in table[2:])
    found = json.loads((tmp_path / "growth.json").read_text())
    assert all(row["tokens_per_second"] > 0 for row in found)


def test_a_measured_row_has_its_forecasts_error():
    row = {"length": 1024, "rows": 2, "rank": 16, "kept": 0, "tokens_per_second": 7293.4, "allocated": 5.25}
    row |= {"forecast_allocated": 5.29, "reserved": 5.6, "forecast_reserved": 5.74, "way": "recorded"}
    assert growth._steps_table([row])[1:] == [
        "|---|---|---|---|---|---|---|---|",
        "| 1024 x 2, recorded | 16 | 0 | 7,293 | 5.25 | 5.29 (+0.8%) | 5.60 | 5.74 (+2.5%) |",
        "", "forecast of allocated memory: +0.8% to +0.8% of what was measured",
        "", "forecast of reserved memory: +2.5% to +2.5% of what was measured",
    ]  # fmt: skip


def test_rows_of_data():
    row = {"rows": 1000, "file_mb": 0.6, "host_gib": [0.66, 0.65], "seconds": [15.2, 9.8]}
    assert growth._rows_table([row])[1:] == ["|---|---|---|---|---|", "| 1,000 | 1 | 0.66 | 15 | 10 |"]
