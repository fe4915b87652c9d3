"""What loading a base promises: NF4 in the linear layers, the compute dtype in all else, and nothing trained."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from lit_qlora.errors import UserError
from lit_qlora.model.base import find_base
from lit_qlora.model.load import load_base

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[3, 77, 500, 2, 9, 41], [4, 5, 6, 7, 8, 9]])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# The base


def linears_4bit(model):
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def test_every_linear_of_the_decoder_is_nf4_with_double_quantisation(load):
    modules = linears_4bit(load())
    wanted = {f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in LINEARS}
    assert modules.keys() == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in wanted}
    for module in modules.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert module.weight.dtype == torch.uint8


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_else_is_in_the_compute_dtype(load, dtype):
    model = load(dtype)
    others = {name: weight.dtype for name, weight in model.named_parameters() if weight.dtype != torch.uint8}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < others.keys()
    assert len(others) == 3 + 2 * 2
    assert set(others.values()) == {dtype}
    assert {module.compute_dtype for module in linears_4bit(model).values()} == {dtype}
    assert logits(model).dtype == dtype


def test_nothing_of_the_base_is_trained(load):
    assert not any(weight.requires_grad for weight in load().parameters())


def test_the_4_bit_weights_are_close_to_the_real_ones(load, tiny):
    from bitsandbytes.functional import dequantize_4bit

    exact = load_file(tiny.location + "/model.safetensors")
    for name, module in linears_4bit(load()).items():
        weight = exact[f"{name}.weight"]
        found = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert 0.05 < (found - weight).norm() / weight.norm() < 0.12  # about 0.1 is what 16 levels can do


def test_nothing_is_taken_from_the_generation_config_of_the_folder(load):
    from transformers import GenerationConfig

    assert load().generation_config.to_diff_dict() == GenerationConfig().to_diff_dict()


def test_a_saved_4_bit_copy_is_the_same_model(load, tmp_path):
    model = load()
    model.save_pretrained(tmp_path)
    copy = find_base(str(tmp_path))
    assert "quantization_config" in copy.config
    loaded = load_base(copy, torch.float32, torch.device("cpu"), "sdpa")
    assert torch.equal(logits(loaded), logits(model))


def test_a_real_llama_with_a_tied_head(load, real):
    model = load(torch.float16, find_base(str(real / "stories260K")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float16
    assert len(linears_4bit(model)) == 5 * 7


def test_truncated_weights_are_refused_in_one_line(load, tiny_folder, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_folder, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(UserError) as error:
        load(base=find_base(str(folder)))
    assert str(error.value).startswith(f"model.base: the weights of {folder} can't be read: model.safetensors: ")
    assert "\n" not in str(error.value)


# A CPU with AVX512-BF16 repacks 4-bit weights in evaluation. Where 32 does not divide a width, that stops with
# an error; where it does, all training after it goes with wrong gradients, without a word. Elsewhere nothing is
# ever repacked, and only the test of the switch can fail.


def test_no_layer_repacks_its_weight(make_model):
    switches = [module.support_avx512bf16_for_cpu for module in linears_4bit(make_model()).values()]
    assert switches == [False] * 14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [172, 192])
def test_an_evaluation_changes_no_gradient(make_model, gradients, tiny, even_tiny, width, dtype):
    model = make_model(dtype, base=tiny if width == 172 else even_tiny)
    assert model.config.intermediate_size == width
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        before = gradients(model)
        evaluated = logits(model)
        after = gradients(model.train())
    assert torch.isfinite(evaluated).all()
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_evaluation_changes_no_logit(make_model):
    model = make_model()
    assert torch.equal(logits(model), logits(model))


def test_a_tiny_base_on_a_cpu_takes_one_thread(tiny):
    """Two threads wait for each other at every small product, for minutes where another process has the second core."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        load_base(tiny, torch.float32, torch.device("cpu"), "sdpa")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
