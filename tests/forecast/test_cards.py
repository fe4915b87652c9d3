"""The table of cards: names in all their spellings, and figures that can be."""

import re

import pytest

from lit_qlora.errors import UserError
from lit_qlora.forecast.cards import CARDS, DEFAULT, find_card


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("t4", "T4"),
        ("Tesla T4", "T4"),
        ("L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("rtx3090", "RTX 3090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("a100", "A100 40GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("a100-80", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h200", "H200"),
    ],
)
def test_spellings(given, name):
    assert find_card(given).name == name


@pytest.mark.parametrize("given", ["V100", "L4x", "A10", "RTX", "", "T400"])
def test_an_unknown_card_is_reported_with_the_known_ones(given):
    known = re.escape(", ".join(card.name for card in CARDS))
    with pytest.raises(UserError, match=rf"^gpu: no card '.*' in the table; there are {known}; give --gpu-gib N"):
        find_card(given)


def test_every_card_finds_itself():
    assert [find_card(card.name) for card in CARDS] == list(CARDS)


def test_the_default_is_a_t4_as_torch_sees_it():
    assert (DEFAULT.name, DEFAULT.memory_gib, DEFAULT.capability) == ("T4", 14.56, (7, 5))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_rates_are_below_the_data_sheet(card):
    sheet = {
        "T4": (65, 320), "L4": (121, 300), "A10G": (70, 600), "RTX 3090": (71, 936), "RTX 4090": (165, 1008),
        "A100 40GB": (312, 1555), "A100 80GB": (312, 2039), "H100": (989, 3350), "H200": (989, 4800),
    }  # fmt: skip
    assert 0.3 < card.tflops / sheet[card.name][0] < 0.85
    assert 0.7 < card.gb_per_s / sheet[card.name][1] < 0.95
