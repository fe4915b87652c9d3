"""What the LightningModule promises: options in range, adapter-only state, the plain loss, and the T4's dtypes."""

import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lit_qlora import quiet
from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.batching import collate
from lit_qlora.errors import UserError
from lit_qlora.model import decoder
from lit_qlora.model.generate import Sampling, generate
from lit_qlora.model.lora import adapter_parameters, save_adapter
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.optimizer import num_applied


@pytest.fixture(autouse=True, scope="module")
def _quiet_loggers():
    """Quieten the loggers as the command line does; the warnings are in conftest.py."""
    for name, level in quiet.LOGGERS.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def module(tiny, make_model):
    """A module with its model put in, as configure_model would do."""

    def build(**options):
        module = QLoRAModule(tiny.location, rank=4, alpha=8.0, **options)
        module.model = make_model(rank=4, alpha=8.0, target_modules=module.lora.target_modules)
        return module

    return build


def example(length, num_asked, seed):
    ids = torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * num_asked + ids[num_asked:]}


ROWS = [example(length, asked, seed) for seed, (length, asked) in enumerate([(12, 4), (7, 2), (15, 9), (5, 4)])]
NUM_ANSWERS = [8, 5, 6, 1]


def micro_batch(*rows, step_answer_tokens=None):
    own = sum(NUM_ANSWERS[row] for row in rows)
    return collate([(row, ROWS[row]) for row in rows], step_answer_tokens or own)


# Options


@pytest.mark.parametrize(
    ("options", "option", "words"),
    [
        ({"rank": 0}, "model.rank", ["from 1", "got 0"]),
        ({"rank": 193}, "model.rank", ["at most 192", "demo", "got 193"]),
        ({"alpha": 0.0}, "model.alpha", ["above 0", "got 0.0"]),
        ({"alpha": math.nan}, "model.alpha", ["above 0", "got nan"]),
        ({"dropout": 1.0}, "model.dropout", ["from 0", "below 1", "got 1.0"]),
        ({"dropout": -0.1}, "model.dropout", ["from 0", "below 1", "got -0.1"]),
        ({"learning_rate": 0.0}, "model.learning_rate", ["above 0", "at most 1", "got 0.0"]),
        ({"learning_rate": 2.0}, "model.learning_rate", ["above 0", "at most 1", "got 2.0"]),
        ({"warmup_ratio": 1.0}, "model.warmup_ratio", ["from 0", "below 1", "got 1.0"]),
        ({"weight_decay": -1.0}, "model.weight_decay", ["got -1.0"]),
        (
            {"attention": "flash_attention_2"},
            "model.attention",
            ["8.0", "CPU", "sdpa"],
        ),
        (
            {"target_modules": ["q"]},
            "model.target_modules",
            ["'q' is none of"],
        ),
        ({"base": "/no/base"}, "model.base", ["no folder '/no/base'"]),
        ({"adapter": "/no/adapter"}, None, ["/no/adapter is no adapter"]),
    ],
)
def test_a_value_out_of_range(options, option, words, expect_error, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_error(lambda: QLoRAModule(**options), *words, option=option)


def test_nothing_is_loaded_before_the_trainer_asks(tiny):
    module = QLoRAModule(tiny.location)
    assert module.model is None
    assert list(module.parameters()) == []


def test_what_was_loaded_in_words(module, tiny):
    assert module().describe() == [
        f"{tiny.location}: 156K weights, linear layers in 4-bit NF4",
        "LoRA of rank 4 on all linear layers: 9.25K weights are trained",
    ]
    assert " on q_proj, v_proj: " in module(target_modules=["q_proj", "v_proj"]).describe()[1]


def test_ranks_that_differ_and_layers_that_are_the_libraries_own_in_words(module, make_model):
    built = module()
    built.model = make_model(rank=4, rank_pattern={"v_proj": 1}, target_modules=["q_proj", "v_proj"])
    assert built.describe()[1].startswith("LoRA of rank 1 to 4 on q_proj, v_proj: ")
    built.slow_because = "DoRA"
    assert built.describe()[-1] == "decoder layers are those of transformers and peft, which take longer: DoRA"


# State


def test_the_state_is_the_adapter_alone(module):
    built = module()
    state = built.state_dict()
    assert len(state) == 28
    assert all("lora_" in name for name in state)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert not any(value.requires_grad for value in state.values())


def test_a_state_is_taken_over(module):
    first, second = module(), module()
    with torch.no_grad():
        for value in adapter_parameters(second).values():
            value.add_(1)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


A_KEY = "model.base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop(A_KEY), f"{A_KEY} is missing, expected [4, 172]"),
        (lambda state: state.update({A_KEY: torch.ones(8, 172)}), f"{A_KEY} is [8, 172], expected [4, 172]"),
        (lambda state: state.update({"a.lora_A": torch.ones(1)}), "a.lora_A is [1], expected no such weight"),
    ],
)
def test_another_state_is_refused_and_changes_nothing(module, change, expected, expect_error):
    built = module()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    expect_error(lambda: built.load_state_dict(state), expected, "another adapter")
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_a_state_that_is_not_finite_is_refused_and_changes_nothing(module, expect_error):
    built = module()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state[A_KEY][1, 2] = float("nan")
    expect_error(
        lambda: built.load_state_dict(state),
        A_KEY,
        "not finite",
        "remove that checkpoint's folder",
        place="the checkpoint",
    )
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_an_adapter_folder_goes_out_and_in(module, tmp_path):
    first, second = module(), module()
    with torch.no_grad():
        for value in adapter_parameters(second).values():
            value.zero_()
    first.save_adapter(tmp_path)
    second.load_adapter_weights(tmp_path)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


# Loss


@pytest.fixture(scope="module")
def plain(make_model, tiny, tmp_path_factory):
    """The model of `module`, by transformers and peft alone."""
    folder = tmp_path_factory.mktemp("plain")
    save_adapter(make_model(rank=4, alpha=8.0), tiny, folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = LlamaForCausalLM.from_pretrained(tiny.location, quantization_config=quantization, device_map={"": "cpu"})
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True).train()


def plain_loss(model, rows):
    """Summed over answer tokens: labels shifted, logits whole, padding masked, all by the library."""
    width = max(len(ROWS[row]["input_ids"]) for row in rows)
    short = [width - len(ROWS[row]["input_ids"]) for row in rows]
    ids = torch.tensor([ROWS[row]["input_ids"] + [0] * gap for row, gap in zip(rows, short, strict=True)])
    labels = torch.tensor([ROWS[row]["labels"] + [IGNORE_INDEX] * gap for row, gap in zip(rows, short, strict=True)])
    mask = torch.tensor([[1] * (width - gap) + [0] * gap for gap in short])
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss * sum(NUM_ANSWERS[row] for row in rows)


@pytest.mark.parametrize("rows", [(0,), (0, 1), (0, 1, 2, 3), (3, 2)])
def test_the_loss_of_a_micro_batch_is_the_plain_one(module, plain, rows):
    built = module()
    loss, num_correct, num_answers = built.summed_loss(micro_batch(*rows))
    expected = plain_loss(plain, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert num_answers == sum(NUM_ANSWERS[row] for row in rows)
    assert 0 <= num_correct <= num_answers

    loss.backward()
    plain.zero_grad()
    expected.backward()
    ours, theirs = adapter_parameters(built.peft_model), adapter_parameters(plain)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight.grad - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm(), name


def test_num_correct_is_of_answer_tokens(module, plain):
    _, num_correct, _ = module().summed_loss(micro_batch(0))
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        likeliest = plain(input_ids=ids).logits[0, :-1].argmax(dim=1)
    assert num_correct.item() == (likeliest == ids[0, 1:])[3:].sum().item()


# In a Trainer


class Data(pl.LightningDataModule):
    """Stands in for the DataModule: given micro-batches, in the given order."""

    def __init__(self, batches, num_steps=10):
        super().__init__()
        self.batches, self.num_steps = batches, num_steps

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)

    val_dataloader = test_dataloader = train_dataloader

    def num_optimizer_steps(self):
        return self.num_steps


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 1, "limit_val_batches": 0, **options},
    )


class Watch(pl.Callback):
    """Gradients and logged loss of every optimizer step."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = adapter_parameters(pl_module)
        self.gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def test_three_micro_batches_of_a_step_make_one_mean_over_its_tokens(module, plain):
    """19 answer tokens in 1 + 1 + 1 rows: a mean of means would weigh a token of a short answer more."""
    batches = [micro_batch(row, step_answer_tokens=19) for row in (0, 1, 2)]
    watch = Watch()
    trainer(accumulate_grad_batches=3, callbacks=[watch]).fit(module(), datamodule=Data(batches))
    plain.zero_grad()
    (sum(plain_loss(plain, (row,)) for row in (0, 1, 2)) / 19).backward()
    (found,) = watch.gradients
    expected = {f"model.{name}": weight.grad for name, weight in adapter_parameters(plain).items()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_batch_without_an_answer_gives_no_nan(module):
    nothing = collate([(0, {"input_ids": [3, 4, 5], "labels": [IGNORE_INDEX] * 3})], 0)
    watch = Watch()
    trainer(callbacks=[watch]).fit(module(), datamodule=Data([nothing]))
    assert watch.losses == [0.0]
    assert all((gradient == 0).all() for gradient in watch.gradients[0].values())


def test_validation_sums_over_all_tokens(module, plain):
    built, runner = module(), trainer(limit_val_batches=1.0)
    for groups in ([(0,), (1, 3), (2,)], [(2, 3)]):  # the second time from zero again
        rows = [row for group in groups for row in group]
        num_tokens = sum(NUM_ANSWERS[row] for row in rows)
        batches = [micro_batch(*group) for group in groups]
        with torch.no_grad():
            expected = sum(plain_loss(plain, (row,)).item() for row in rows) / num_tokens
            num_correct = sum(built.summed_loss(batch)[1].item() for batch in batches)
        runner.validate(built, datamodule=Data(batches), verbose=False)
        assert runner.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-5)
        assert runner.callback_metrics["val/perplexity"].item() == pytest.approx(math.exp(expected), rel=1e-4)
        assert runner.callback_metrics["val/accuracy"].item() == pytest.approx(num_correct / num_tokens)


@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_the_trainer_gets_a_model_in_train_mode_that_keeps_what_was_asked_for(tiny, monkeypatch, checkpointing):
    kept = []
    real = decoder._DecoderLayer.apply

    def watched(how, *tensors):
        kept.append((how.keeps, torch.is_grad_enabled()))
        return real(how, *tensors)

    monkeypatch.setattr(decoder._DecoderLayer, "apply", watched)
    modes = []

    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append({part.training for part in pl_module.peft_model.modules()})

    data = Data([micro_batch(0), micro_batch(1)])
    built = QLoRAModule(tiny.location, dropout=0.1, checkpointing=checkpointing)
    trainer(callbacks=[Modes()], limit_val_batches=1.0, val_check_interval=1).fit(built, datamodule=data)
    assert modes == [{True}, {True}]  # the second after a validation
    # Layers times training batches; of a validation nothing is kept in any way.
    assert [keeps for keeps, with_gradients in kept if with_gradients] == [checkpointing == "none"] * 2 * 2
    assert {keeps for keeps, with_gradients in kept if not with_gradients} == {False}


def test_with_dora_the_layers_are_the_libraries_with_recomputation(tiny, monkeypatch):
    from lit_qlora.model import checkpointing

    calls = []

    def counted(forward, *args, **kwargs):
        calls.append(forward)
        return torch.utils.checkpoint.checkpoint(forward, *args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)

    modes = []

    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append({part.training for part in pl_module.peft_model.modules()})

    data = Data([micro_batch(0), micro_batch(1)])
    built = QLoRAModule(tiny.location, dropout=0.1, dora=True, checkpointing="full")
    trainer(callbacks=[Modes()], limit_val_batches=1.0, val_check_interval=1).fit(built, datamodule=data)
    assert modes == [{True}, {True}]  # the second after a validation
    assert len(calls) == 2 * 2  # layers times training batches, none of a validation


def test_transformers_own_layers_compute_again_once_memory_ran_out(tiny, monkeypatch):
    from lit_qlora.model import checkpointing

    calls = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *args, **how: calls.append(1) or real(*args, **how))
    for mode, kept_layers in (("full", 0), ("auto", 0), ("none", 2)):
        built = QLoRAModule(tiny.location, own_layers=False, checkpointing=mode)
        trainer().fit(built, datamodule=Data([micro_batch(0)]))
        assert built.slow_because == "model.own_layers is false"
        assert built.kept_layers == kept_layers
    calls.clear()
    built.summed_loss(micro_batch(0))
    assert not calls
    built._recompute()
    built.summed_loss(micro_batch(0))
    assert (built.kept_layers, len(calls)) == (0, 2)


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        ({}, {}, None),
        ({"hidden_act": "swish"}, {"dropout": 0.1}, None),
        ({"hidden_act": "gelu"}, {"dora": True}, "an activation or a dropout that is not Llama's"),
        ({"attention_dropout": 0.1}, {}, "an activation or a dropout that is not Llama's"),
        ({}, {"dora": True}, "DoRA"),
        ({}, {"own_layers": False}, "model.own_layers is false"),
    ],
)
def test_who_computes_the_layers_is_known_before_weights_are_loaded(save_llama, tmp_path, config, settings, why):
    built = QLoRAModule(str(save_llama(tmp_path / "base", **config)), **settings)
    assert (built.model, built.slow_because) == (None, why)
    built.configure_model()
    assert built.slow_because == why


@pytest.mark.parametrize(("option", "expected"), [("shard", "false"), ("cuda_graphs", "auto or false")])
def test_what_only_our_layers_do_is_refused_before_weights_are_loaded(save_llama, tmp_path, option, expected):
    base = str(save_llama(tmp_path / "base", hidden_act="gelu"))
    with pytest.raises(UserError, match=f"expected {expected} with an activation") as caught:
        QLoRAModule(base, **{option: True})
    assert caught.value.option == f"model.{option}"


def test_the_adapter_to_start_from_is_trained_on(make_model, tiny, tmp_path):
    model = make_model(rank=3)
    save_adapter(model, tiny, tmp_path)
    # A step small enough to see that it set out from there.
    built = QLoRAModule(
        tiny.location, adapter=str(tmp_path), rank=3, alpha=8.0, learning_rate=1e-6, schedule="constant"
    )
    trainer().fit(built, datamodule=Data([micro_batch(0)]))
    assert built.describe()[1].startswith("LoRA of rank 3 on all linear layers")
    trained, first = adapter_parameters(built.peft_model), adapter_parameters(model)
    assert trained.keys() == first.keys()
    assert all(0 < (trained[name] - weight).abs().max() < 2e-6 for name, weight in first.items())


def test_kernels_of_an_adapter_that_is_not_ours_to_compute_are_not_recorded(make_model, tiny, tmp_path):
    save_adapter(make_model(rank=3, lora_bias=True), tiny, tmp_path)
    with pytest.raises(UserError) as caught:
        QLoRAModule(tiny.location, adapter=str(tmp_path), rank=3, cuda_graphs=True)
    assert "model.cuda_graphs: expected auto or false" in str(caught.value)
    assert "lora_bias" in str(caught.value)


def test_the_schedule_takes_its_length_from_the_data_module(module):
    built = module(learning_rate=0.2, schedule="linear", warmup_ratio=0.0)
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(callbacks=[Rates()]).fit(built, datamodule=Data([micro_batch(0)] * 4, num_steps=4))
    assert rates == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert built.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_a_validation_drops_nothing(tiny, make_model):
    """Between training steps, which do."""
    losses = []

    class Losses(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["val/loss"].item())

    built = QLoRAModule(tiny.location, dropout=0.5, learning_rate=1e-9)
    built.model = make_model(dropout=0.5)
    data = Data([micro_batch(0), micro_batch(1), micro_batch(2)])
    trainer(callbacks=[Losses()], limit_val_batches=1.0, val_check_interval=1).fit(built, datamodule=data)
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-5


def test_the_gradient_norm_is_kept_from_before_clipping_and_computed_once(module, monkeypatch):
    built = module()
    watch, computed, real = Watch(), [], torch.linalg.vector_norm
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda *given, **options: computed.append(1) or real(*given, **options)
    )
    trainer(callbacks=[watch], gradient_clip_val=1e-3).fit(built, datamodule=Data([micro_batch(0)]))
    (gradients,) = watch.gradients  # seen before clipping, too
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    assert built.gradient_norm.item() == pytest.approx(expected, rel=1e-5)
    clipped = [weight.grad for weight in adapter_parameters(built).values() if weight.grad is not None]
    assert built.gradient_norm > 1e-2
    assert len(computed) == 1
    assert torch.nn.utils.get_total_norm(clipped).item() <= 1.001e-3


def test_answers_are_those_of_generate(module):
    built = module()
    trainer().fit(built, datamodule=Data([micro_batch(0)]))
    prompts, sampling = [[1, 77, 400], [1, 5]], Sampling(5)
    assert built.answer(prompts, [511], sampling) == generate(built.peft_model, prompts, [511], sampling)


# As on a T4, but on the CPU: fp16 autocast with a gradient scaler. The GPU's own kernels are not seen by this.


class NoBf16(TorchDispatchMode):
    """Fails at the first operation that takes or gives a bfloat16 tensor, in forward, backward and update."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.dtype != torch.bfloat16, f"{func} in bfloat16"
        return out


def half_trainer(**options):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # from 65,536 on, as on a GPU
    return trainer(plugins=[plugin], gradient_clip_val=1.0, **options)


def test_the_watch_sees_bf16():
    with NoBf16(), pytest.raises(AssertionError, match="in bfloat16"):
        torch.ones(2).bfloat16()
    with NoBf16(), torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="in bfloat16"):
        torch.ones(2, 2) @ torch.ones(2, 2)


# The scaler skips its first steps, and torch then takes the schedule for stepped before the optimizer; it is not.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_a_t4_trains_in_fp16_without_any_bf16(tiny, checkpointing):
    built = QLoRAModule(tiny.location, rank=4, dropout=0.1, learning_rate=1e-2, checkpointing=checkpointing)
    watch, streams = Watch(), []

    class Streams(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            norm = pl_module.peft_model.get_base_model().model.norm
            norm.register_forward_hook(lambda _, args, out: streams.extend((args[0].dtype, out.dtype)))

    data = Data([micro_batch(0, 1), micro_batch(2, 3)] * 8)
    runner = half_trainer(callbacks=[watch, Streams()], limit_val_batches=2)
    with NoBf16():
        runner.fit(built, datamodule=data)
    assert runner.precision == "16-mixed"
    assert set(streams) == {torch.float16}
    assert {weight.dtype for weight in adapter_parameters(built).values()} == {torch.float32}
    assert {gradient.dtype for step in watch.gradients for gradient in step.values()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert all(torch.isfinite(weight).all() for weight in adapter_parameters(built).values())
    applied = num_applied(runner.optimizers[0])
    assert 4 <= applied <= 16
    second_matrices = [weight for name, weight in adapter_parameters(built).items() if "lora_B" in name]
    assert all(weight.abs().sum() > 0 for weight in second_matrices)  # they start at zero
    assert sum(watch.losses[-4:]) < sum(watch.losses[:4])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # as above
def test_the_fp16_loss_is_close_to_the_fp32_one(tiny):
    losses = {}
    for runner in (trainer, half_trainer):
        watch = Watch()
        built = QLoRAModule(tiny.location, rank=4)
        runner(callbacks=[watch]).fit(built, datamodule=Data([micro_batch(0, 1)]))
        losses[runner] = watch.losses[0]
    assert losses[half_trainer] == pytest.approx(losses[trainer], rel=1e-2)
    assert losses[half_trainer] != losses[trainer]


def test_answers_are_given_in_the_same_precision(tiny):
    built = QLoRAModule(tiny.location, rank=4)
    half_trainer(limit_val_batches=1).validate(built, datamodule=Data([micro_batch(0)]), verbose=False)
    seen = set()
    for layer in built.peft_model.get_base_model().model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.add((out.dtype, torch.get_autocast_dtype("cpu"))))
        layer.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    with NoBf16():
        (answer,) = built.answer([[1, 77, 400]], [511], Sampling(4))
    assert len(answer) == 4
    assert seen == {(torch.float16, torch.float16), True}


def test_a_loss_that_is_not_finite_is_not_left_out_of_the_held_out_sum(module):
    """torchmetrics drops NaN by default: a broken model would score better for each token that it breaks on."""
    built = module()
    with torch.no_grad():
        for value in adapter_parameters(built).values():
            value.fill_(math.nan)
    runner = trainer(limit_val_batches=1.0)
    runner.validate(built, datamodule=Data([micro_batch(0), micro_batch(1)]), verbose=False)
    assert math.isnan(runner.callback_metrics["val/loss"].item())
