"""Owns what one process of a test on GPUs does: a fit that is looked into, or the layers of a shared base alone.

A process of its own for each GPU, since CUDA outlives no fork: ``python on_gpu.py FOLDER fit LIMITS OPTIONS``, with
torchrun's variables. It leaves what it saw in FOLDER.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from lit_qlora.cli import main, prepare_memory

PASSES = 6
"""Number of passes of a micro-batch through all layers, each of another length."""
OVERFLOWS_IN = 3
"""The optimizer step in which one process's gradient overflows."""


def fit(folder: Path, limits: str, args: list[str]) -> int:
    """The exit status of a fit under ``limits``: t4, none, or overflow, a T4's with one gradient that is infinite."""
    if limits != "none":
        sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
        import as_t4

        as_t4.emulate()
    from lit_qlora.model.module import QLoRAModule

    QLoRAModule.on_train_end = lambda self: _look(folder, self)  # type: ignore[assignment, method-assign]
    if limits == "overflow":
        _overflow()
    return main(args)


def _look(folder: Path, module: Any) -> None:
    import torch

    weights = [one for one in module.peft_model.parameters() if hasattr(one, "quant_state")]
    storages = {one.data.untyped_storage().data_ptr(): one.data.untyped_storage().nbytes() for one in weights}
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    found = {
        "storages": [*storages.values()],
        "own_bytes": module.shards and module.shards.own_bytes,
        "layer_bytes": module.shards and module.shards.layer_bytes,
        "num_layers": module.base.shape.num_layers,
        "packed_bytes": sum(one.data.nbytes for one in weights),
        "device": str(module.device),
        "allocated": torch.cuda.memory_allocated(),
        "scale": scaler and scaler.get_scale(),
        "records": module.uses_cuda_graphs,
    }
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")


def _overflow() -> None:
    from lit_qlora.devices.strategy import Replicas, ends_step
    from lit_qlora.devices.world import world

    real, steps = Replicas.post_backward, [0]

    def post_backward(self: Any, loss: Any) -> None:
        trainer = self.lightning_module.trainer
        if ends_step(trainer, trainer.fit_loop.batch_idx):
            steps[0] += 1
            if steps[0] == OVERFLOWS_IN and world().rank == 1:
                self._trained()[0].grad.view(-1)[0] = float("inf")
        real(self, loss)

    Replicas.post_backward = post_backward  # type: ignore[method-assign]


def layers(folder: Path, base: str, args: list[str]) -> int:
    """Compare the results of a shared base's layers with a whole one's, over passes with nothing in between.

    A copy that came too late, or into a buffer that is still read, would give another layer's bytes.
    """
    import torch

    from lit_qlora.devices import world
    from lit_qlora.model.base import find_base
    from lit_qlora.model.load import load_base
    from lit_qlora.model.sharded_base import load_sharded

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    gpu = world.world().local_rank
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(gpu)
    world.join(gpu)
    model = find_base(base)
    whole = _with_lora(load_base(model, torch.bfloat16, device, "sdpa"))
    wanted = [_through(whole, None, tokens) for tokens in _lengths()]
    found: dict[str, Any] = {}
    for where in args:
        loaded, shards = load_sharded(model, torch.bfloat16, device, "sdpa", where == "host")
        shared = _with_lora(loaded)
        for _ in range(2):  # the second time, buffers hold what the first left there
            results = [_through(shared, shards, tokens) for tokens in _lengths()]
            pairs = [zip(*both, strict=True) for both in zip(results, wanted, strict=True)]
            same = [torch.equal(one, other) for pair in pairs for one, other in pair]
            found[where] = found.get(where, True) and all(same)
        found[f"{where} compared"] = len(same)
    world.leave()
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def _with_lora(model: Any) -> Any:
    """The same adapter each time, with no weight at 0."""
    import torch

    from lit_qlora.model.lora import Lora, adapter_parameters, add_lora

    found = add_lora(model, Lora(8, 8.0, 0.0, "all-linear", False, False)).train()
    generator = torch.Generator().manual_seed(1)
    for value in adapter_parameters(found).values():
        value.data.copy_(torch.randn(value.shape, generator=generator) / 50)
    return found


def _lengths() -> range:
    return range(16, 16 + 48 * PASSES, 48)


def _through(model: Any, shards: Any, tokens: int) -> list[Any]:
    """Hidden states and all gradients of LoRA."""
    import torch

    from lit_qlora.model.attention import find_places
    from lit_qlora.model.decoder import extract_layers, weights_of
    from lit_qlora.model.lora import adapter_parameters
    from lit_qlora.model.pointwise import EAGER
    from tests.tiny_llama import run_layers

    inner = model.get_base_model().model
    ids = torch.randint(3, 512, (2, tokens), generator=torch.Generator().manual_seed(tokens)).to(model.device)
    hidden = inner.embed_tokens(ids)
    found = extract_layers(model, EAGER, weights_of(model, shards))
    out = run_layers(found, hidden, find_places(inner.rotary_emb, hidden, ()), 0)
    model.zero_grad()
    out.float().square().mean().backward()
    return [out.detach(), *(value.grad.clone() for value in adapter_parameters(model).values())]


if __name__ == "__main__":
    prepare_memory()
    do = {"fit": fit, "layers": layers}[sys.argv[2]]
    raise SystemExit(do(Path(sys.argv[1]), sys.argv[3], sys.argv[4:]))
