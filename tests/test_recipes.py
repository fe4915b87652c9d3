"""The recipes for several cards, as far as a machine without any can try them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_qlora.cli import main
from lit_qlora.storage.run import flat
from lit_qlora.tools import plan

ROOT = Path(__file__).parents[1]


def settings(config: str) -> dict[str, Any]:
    return flat(yaml.safe_load((ROOT / "configs" / config).read_text(encoding="utf-8")))


def test_kaggles_config_is_colabs_but_for_what_two_cards_change() -> None:
    colab, kaggle = settings("colab_t4.yaml"), settings("kaggle_2xt4.yaml")
    changed = {name: kaggle.get(name) for name in {*colab, *kaggle} if colab.get(name) != kaggle.get(name)}
    assert changed == {
        "data.batch_size": None,
        "data.batch_tokens": 2048,
        "trainer.devices": 2,
        "trainer.accumulate_grad_batches": 4,
        "trainer.log_every_n_steps": 10,
        "save_every_steps": 50,
    }


def test_the_figures_in_kaggles_config_are_the_forecasts(capsys: pytest.CaptureFixture[str]) -> None:
    head = (ROOT / "configs" / "kaggle_2xt4.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert main(["plan", "--config", "kaggle_2xt4", "--gpu", "t4"]) == 0
    shown = capsys.readouterr().out
    hours = re.search(r"the run, 3 epochs: ([\d.]+) h to ([\d.]+) h", shown)
    speeds = re.search(r": ([\d,]+) to ([\d,]+) tokens/s", shown)
    needed = re.search(r"^fits: ([\d.]+) of 14.56 GiB$", shown, re.MULTILINE)
    assert hours and f"{hours[1]} to {hours[2]} h for 3 epochs of 9,846 conversations" in head
    assert speeds and f"({speeds[2]} to {speeds[1]}\n# " in head
    assert needed and f"{float(needed[1]):.1f} of 14.56 GiB per card predicted, 0.5 of which NCCL holds" in head
    shares = {}
    for name, options in {
        "as it is": [],
        "two": ["--trainer.accumulate_grad_batches", "2"],
        "rows": ["--trainer.accumulate_grad_batches", "2", "--data.batch_tokens", "null", "--data.batch_size", "4"],
    }.items():
        found = plan.read(["--config", "kaggle_2xt4", "--gpu", "t4", *options]).forecast
        shares[name] = f"{found.efficiency:.0%}".replace("%", " %")
    words = " ".join(re.sub(r"^#", "", head, flags=re.MULTILINE).split())
    assert f"each card works {shares['as it is']} of the time. With two micro-batches it is {shares['two']}" in words
    assert f"with two of 4 conversations each {shares['rows']}" in words
