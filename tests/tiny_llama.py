"""Owns the tiny Llama that the model tests run on: random, seeded, with one odd width, quantised by the real code.

What is heavy is imported where it is used: the process that hands out tests needs none of it.
"""

import copy
import gc
import json
from pathlib import Path

import pytest

from lit_qlora import quiet
from tests.small_bases import save_random


def pytest_configure(config):
    """Lets through what the command line silences too; lit_qlora/quiet.py has the reason beside each."""
    for message in quiet.WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def save_llama(folder, seed=0, **changes):
    return save_random(folder, "llama", seed, "model.norm.", changes)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder; its generation_config.json asks for what nobody here asked for."""
    folder = save_llama(tmp_path_factory.mktemp("bases") / "tiny-llama")
    odd = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 7, "eos_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(odd), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a Llama with heads as wide as Llama 2's."""
    heads = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    return save_llama(tmp_path_factory.mktemp("bases") / "wide-llama", **heads)


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    from lit_qlora.model.base import find_base

    return find_base(str(tiny_folder))


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory):
    """Make another base of the same widths."""
    from lit_qlora.model.base import find_base

    return find_base(str(save_llama(tmp_path_factory.mktemp("bases") / "other-llama", seed=1)))


@pytest.fixture(scope="session")
def even_tiny(tmp_path_factory):
    """A base whose widths are all divisible by 32."""
    from lit_qlora.model.base import find_base

    return find_base(str(save_llama(tmp_path_factory.mktemp("bases") / "even-llama", intermediate_size=192)))


@pytest.fixture(scope="session")
def load(tiny):
    """Loads the tiny Llama in 4-bit, without an adapter: a copy, for each of hundreds of tests, of what was loaded."""

    import torch

    from lit_qlora.model.load import load_base

    loaded = {}

    def load(dtype=torch.float32, base=tiny):
        key = dtype, base.location, str(base.config)
        if key not in loaded:
            loaded[key] = load_base(base, dtype, torch.device("cpu"), "sdpa")
        return copy.deepcopy(loaded[key])

    return load


def of_pefts_config(model, chosen, others):
    """An adapter with ``others`` of LoraConfig's fields, which none of our options gives."""
    from peft import LoraConfig, get_peft_model

    from lit_qlora.model.shape import target_names

    targets = list(target_names(chosen["target_modules"]))
    config = {"r": chosen["rank"], "lora_alpha": chosen["alpha"], "target_modules": targets}
    return get_peft_model(model, LoraConfig(**config, **others, task_type="CAUSAL_LM"))


@pytest.fixture(scope="session")
def make_model(load):
    """Loads the tiny Llama in 4-bit with an adapter that is not zero, in train mode."""
    import torch

    from lit_qlora.model.checkpointing import checkpoint_layers
    from lit_qlora.model.lora import Lora, adapter_parameters, add_lora

    def make(dtype=torch.float32, checkpointing="none", base=None, **lora):
        model = load(dtype, base) if base else load(dtype)
        checkpoint_layers(model.model.layers, checkpointing)
        chosen = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear", "rslora": False}
        of_peft = {name: lora.pop(name) for name in [*lora] if name not in {*chosen, "dora"}}
        chosen |= {"dora": False, **lora}
        model = of_pefts_config(model, chosen, of_peft) if of_peft else add_lora(model, Lora(**chosen))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapter_parameters(model).items():
                if "magnitude" not in name:
                    parameter.normal_(std=0.1)
        return model.train()

    return make


def run_layers(layers, hidden, places, kept_layers):
    """The hidden states after the layers, of one micro-batch."""
    from lit_qlora.model.decoder import MicroBatch, draw_seeds, run_together

    return run_together(layers, [MicroBatch(hidden, places, draw_seeds(layers))], kept_layers)[0]


@pytest.fixture(scope="session")
def gradients():
    """One training step's gradients, by name, the same randomness each time."""
    import torch

    from lit_qlora.model.lora import adapter_parameters
    from lit_qlora.model.loss import summed_cross_entropy

    def gradients(model):
        torch.manual_seed(2)
        ids = torch.randint(3, 512, (2, 12))
        model.zero_grad()
        llama = model.get_base_model()
        hidden = llama.model(input_ids=ids, use_cache=False).last_hidden_state
        summed_cross_entropy(hidden[:, :-1].flatten(0, 1), llama.lm_head.weight, ids[:, 1:].flatten())[0].backward()
        return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}

    return gradients


@pytest.fixture(scope="session", name="save_llama")
def save_llama_fixture():
    """Writes a tiny random Llama into a folder."""
    return save_llama


@pytest.fixture(scope="session")
def held_bytes():
    """What is still held of memory while the result of a function is."""

    def held_bytes(run):
        result, events = memory_events(run)
        assert result.grad_fn is not None
        return sum(event.nbytes() for event in events)

    return held_bytes


def memory_events(run):
    """What a function returns, and the events of torch's allocator meanwhile, in order; no garbage is collected."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.disable()
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
            result = run()
    finally:
        gc.enable()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, sorted(events, key=lambda event: event.start_ns())
