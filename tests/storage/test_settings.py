"""What may change between two starts of a run, row by row; everything else is refused."""

import pytest

from lit_qlora.signatures import options_of
from lit_qlora.storage import settings
from lit_qlora.storage.settings import MAY_CHANGE, differences


def refused(was, now):
    return [str(change) for change in settings.refused(was, now)]


def changes(was, now):
    return [str(change) for change in differences(was, now)]


def nested(name, value):
    *sections, last = name.split(".")
    config = {last: value}
    for section in reversed(sections):
        config = {section: config}
    return config


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_may_change_is_reported(name):
    was, now = nested(name, 1), nested(name, 2)
    assert refused(was, now) == []
    assert changes(was, now) == [f"{name}: 1 -> 2"]
    assert changes(was, was) == []


@pytest.mark.parametrize(
    "name",
    [
        *("seed_everything", "data.source", "data.validation_source", "data.validation_share", "data.system"),
        *("data.train_on", "data.max_length", "data.batch_size", "data.batch_tokens", "data.form"),
        *("model.rank", "model.alpha", "model.dropout", "model.target_modules", "model.rslora", "model.dora"),
        *("model.learning_rate", "model.warmup_ratio", "model.schedule", "model.optimizer"),
        *("model.weight_decay", "model.attention", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val"),
        *("trainer.limit_train_batches", "trainer.limit_val_batches", "an.option.of.tomorrow"),
        *("mirrors", "model.base_revision", "trainer.max_steps_more"),  # no name is taken by its beginning
    ],
)
def test_everything_else_makes_another_run(name):
    was, now = nested(name, 1), nested(name, 2)
    assert refused(was, now) == [f"{name}: 1 -> 2"]
    assert refused(was, {}) == [f"{name}: 1 -> None"]


def test_an_option_has_an_effect_on_a_score_or_only_training_reads_it():
    """A new one is listed here, or in `TRAINS_ONLY`."""
    options = {one.name for one in options_of("validate")}
    trained = {name for name in options if name.startswith(settings.TRAINS_ONLY)}
    assert options - trained == {
        "run", "ckpt_path", "seed_everything",
        "model.base", "model.adapter", "model.attention", "model.compile", "model.cuda_graphs", "model.loss_rows",
        "model.own_layers", "model.quantized_cache", "model.shard", "model.shard_to",
        "data.source", "data.validation_source", "data.validation_share", "data.test_source", "data.form",
        "data.columns", "data.strict", "data.template", "data.system", "data.opening", "data.train_on",
        "data.max_length", "data.batch_size", "data.batch_tokens", "data.packing", "data.num_workers",
        "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.precision", "trainer.deterministic",
        "trainer.benchmark", "trainer.inference_mode", "trainer.detect_anomaly", "trainer.limit_val_batches",
        "trainer.limit_test_batches", "trainer.enable_progress_bar", "trainer.callbacks", "trainer.plugins",
    }  # fmt: skip
    assert {name for name in settings.TRAINS_ONLY if name != "samples"} < options


def test_a_section_that_may_change_may_change_in_all_its_parts():
    was, now = {"samples": {"count": 8}}, {"samples": {"count": 2, "prompts": ["x"]}}
    assert refused(was, now) == []
    assert changes(was, now) == [
        "samples.count: 8 -> 2",
        "samples.prompts: None -> ['x']",
    ]


def test_a_run_from_before_an_option_resumes_where_the_option_changes_nothing():
    was, now = {"data": {"form": "auto"}}, {"data": {"form": "auto", "strict": False}}
    assert (refused(was, now), changes(was, now)) == ([], ["data.strict: None -> False"])


def test_differences_are_reported_by_dotted_names():
    was = {
        "seed": 1,
        "model": {"rank": 8, "base": "demo", "deep": {"a": [1, 2]}},
        "data": None,
        "trainer": {"steps": 1},
    }
    now = {"seed": 2, "model": {"rank": 16, "base": "demo", "deep": {"a": [1]}, "new": True}, "data": {"source": "x"}}
    assert [*map(str, differences(was, now))] == [
        "data.source: None -> x",
        "model.deep.a: [1, 2] -> [1]",
        "model.new: None -> True",
        "model.rank: 8 -> 16",
        "seed: 1 -> 2",
        "trainer.steps: 1 -> None",
    ]
    assert differences(was, was) == []


@pytest.mark.parametrize("name", ["data.source", "data.validation_source", "data.source.path"])
def test_rows_may_lie_elsewhere_if_they_are_the_same(name):
    was, now = nested(name, "a"), nested(name, "b")
    assert settings.refused(was, now, lambda: True) == []
    assert refused(was, now) == [f"{name}: a -> b"]
    other = [f"{name}: a -> b", "model.rank: 8 -> 16"]
    assert [
        *map(str, settings.refused(was | nested("model.rank", 8), now | nested("model.rank", 16), lambda: True))
    ] == other
