"""The decision to share the base where nothing is trained: by its weights and by what a micro-batch takes beside
them."""

from types import SimpleNamespace
from typing import Any

import pytest

from lit_qlora.callbacks import shard
from lit_qlora.callbacks.shard import ShardChoice
from lit_qlora.forecast.cards import Card
from lit_qlora.model.lora import Lora
from lit_qlora.model.shape import Shape

LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 32_000,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip


def chosen(monkeypatch: pytest.MonkeyPatch, gib: float, tokens: int, **changes: Any) -> Any:
    monkeypatch.setattr(shard, "current_card", lambda: Card("test", gib, (8, 9)))
    own = {"shard": "auto", "shard_to": "host", "slow_because": None, "loss_rows": 1024}
    lora = Lora(8, 8.0, 0.0, "all-linear", False, False)
    module = SimpleNamespace(base=SimpleNamespace(shape=Shape.of(LLAMA_70B)), lora=lora, **own | changes)
    data = SimpleNamespace(plan=SimpleNamespace(tokens=tokens, rows=0), max_length=512)
    trainer = SimpleNamespace(datamodule=data, precision="bf16-mixed")
    ShardChoice().setup(trainer, module, "validate")  # type: ignore[arg-type]
    return module.shard


@pytest.mark.parametrize(("gib", "tokens", "shared"), [(48, 512, False), (24, 512, True), (44, 512, False),
                                                       (44, 8192, True)])  # fmt: skip
def test_a_micro_batch_counts_beside_the_weights(
    monkeypatch: pytest.MonkeyPatch, gib: float, tokens: int, shared: bool
) -> None:
    """34 GiB of weights; with 512 tokens it is 38.4 in all, with 8,192 it is 42.1. A tenth of the card stays free."""
    assert chosen(monkeypatch, gib, tokens) is shared


@pytest.mark.parametrize("changes", [{"slow_because": "DoRA"}, {"shard_to": "gpu"}, {"shard": False}])
def test_what_cannot_be_shared_is_not(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    assert chosen(monkeypatch, 24, 512, **changes) is False
