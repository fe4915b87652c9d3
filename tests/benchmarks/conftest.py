"""What each test of a benchmark leaves as it was."""

import pytest


@pytest.fixture(autouse=True)
def visible_gpus(monkeypatch):
    """A benchmark sets for its own process and those that it starts which GPUs there are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
