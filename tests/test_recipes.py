"""The recipes for several cards, as far as a machine without any can try them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import many_cards
from lit_qlora.cli import main
from lit_qlora.command import complete
from lit_qlora.devices.asked import check_shares
from lit_qlora.errors import UserError
from lit_qlora.storage.config_file import flat
from lit_qlora.tools.plan import PlanCLI

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
    hours = re.search(r"the run, 3 epochs: ([\d.]+) to ([\d.]+) h", shown)
    speeds = re.search(r": ([\d,]+) to ([\d,]+) tokens/s", shown)
    needed = re.search(r"^fits: ([\d.]+) of 14.56 GiB$", shown, re.MULTILINE)
    assert hours and f"{hours[1]} to {hours[2]} h for 3 epochs of 9,846 conversations" in head
    assert speeds and f"({speeds[2]} to {speeds[1]}\n# " in head
    assert needed and f"{float(needed[1]):.1f} of 14.56 GiB per card forecast, 0.5 of which NCCL holds" in head
    shares = {}
    for name, options in {
        "as it is": [],
        "two": ["--trainer.accumulate_grad_batches", "2"],
        "rows": ["--trainer.accumulate_grad_batches", "2", "--data.batch_tokens", "null", "--data.batch_size", "4"],
    }.items():
        found = PlanCLI.of(complete(["plan", "--config", "kaggle_2xt4", "--gpu", "t4", *options])).found.forecast
        shares[name] = f"{found.efficiency:.0%}".replace("%", " %")
    words = " ".join(re.sub(r"^#", "", head, flags=re.MULTILINE).split())
    assert f"each card works {shares['as it is']} of the time. With two micro-batches it is {shares['two']}" in words
    assert f"with two of 4 conversations each {shares['rows']}" in words


def test_the_70bs_config_is_shared_by_two_cards_as_its_head_says(capsys: pytest.CaptureFixture[str]) -> None:
    head = (ROOT / "configs" / "70b_2x24.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert main(["plan", "--config", "70b_2x24", "--gpu", "4090"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    needed = re.search(r"fit[^:]*: ([\d.]+) of 23.64 GiB", shown)
    comes = re.search(r"keeps 1/2 of the base's layers, .* ([\d.]+ GB per micro-batch)", shown)
    takes = re.search(r"an epoch takes ([\d.]+) to ([\d.]+) h: (\d+) to (\d+) tokens/s", shown)
    assert needed and f"{float(needed[1]):.1f} of 23.64 GiB per card" in head
    assert comes and comes[1] in head
    assert takes and f"{takes[1]} to {takes[2]} h for one epoch" in head and f"({takes[4]} to {takes[3]} tokens" in head
    # Where cards have the room, each keeps the whole base.
    assert not PlanCLI.of(complete(["plan", "--config", "70b_2x24", "--gpu", "a100-80"])).found.forecast.is_shared
    assert PlanCLI.of(complete(["plan", "--config", "70b_2x24", "--gpu", "4090"])).found.forecast.is_shared


def test_the_tables_on_many_cards_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "several-devices.md").read_text(encoding="utf-8")
    per = many_cards.costs("a100-80", 12.5)
    for table in (many_cards.same_step(per), many_cards.growing_step(per)):
        assert "\n".join(table) in page
    assert "\npython benchmarks/many_cards.py\n" in page


def test_more_cards_than_micro_batches_are_refused_in_the_tables_and_by_fit() -> None:
    per = many_cards.costs("a100-80", 12.5)
    (_, _, four, *_) = many_cards.same_step(per)
    assert four.endswith("| refused | refused | refused |")
    with pytest.raises(UserError, match=r"trainer\.devices: 8, and a step has 4 micro-batches"):
        check_shares(8, 4)
    # A step of one machine needs no network, and one that is as large on more machines waits longer.
    one, two, many = (many_cards.find(64, cards, per) for cards in (8, 16, 64))
    assert one.exchange_s == 0 < two.exchange_s < many.exchange_s and one.share > two.share > many.share
    assert two.exchange_s == pytest.approx(2 * 4 * 39_976_960 / 2 / 12.5e9)
    # Each process also goes through the others' micro-batches: 4,096 of them take it 4.1 s, more than its own four.
    most = many_cards.find(4096, 1024, per)
    tokens = sum(many_cards.sizes(4096 * many_cards.STEPS)) / many_cards.STEPS
    assert tokens / most.tokens_per_s == pytest.approx(4.096 + most.exchange_s)


def test_torchrun_is_shown_with_the_bar_that_keeps_options_apart() -> None:
    """Otherwise torchrun takes --run for an abbreviation of its own --run-path."""
    page = (ROOT / "docs" / "several-devices.md").read_text(encoding="utf-8")
    assert re.search(r"torchrun --nnodes 2 [^\n]* -- \\\n +main\.py fit", page)
