"""What the terminal is told of a run that goes on."""

import pytest
import torch

from lit_qlora.callbacks import report

BUT = "; state and order are exact, a GPU's last bits only with --trainer.deterministic true"


@pytest.mark.parametrize(
    ("resumed_from", "on_gpu", "deterministic", "told"),
    [
        (None, True, False, ""),
        ("step-4", False, False, ", going on from step-4"),
        ("step-4", True, False, f", going on from step-4{BUT}"),
        ("step-4", True, True, ", going on from step-4"),
    ],
)
def test_how_exact_a_resume_is_is_said(monkeypatch, resumed_from, on_gpu, deterministic, told):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert report._going_on(resumed_from, on_gpu) == told
