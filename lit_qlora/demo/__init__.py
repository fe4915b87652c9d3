"""Owns the embedded demo: a tiny Llama trained for this project, its tokenizer, and conversations for it.

``BASE`` is a Hugging Face folder: it has read about a made-up archipelago, and was never asked a question
nor saw a text end. ``TRAIN`` and ``TEST`` ask about it, row by row, in openassistant-guanaco's form.
``python -m scripts.demo.build`` makes all three from nothing. Knows only where they are.
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
TRAIN = Path(__file__).parent / "train.jsonl"
TEST = Path(__file__).parent / "test.jsonl"

WORLD = "made-up islands: 36 villages, in each an islander with work and a pet"
QUESTION = "Who goes everywhere with Silas?"
"""A question about a held-out islander: the base has read about him, and no training row names him."""
