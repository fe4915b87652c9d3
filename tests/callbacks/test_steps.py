"""The moment after an optimizer step comes once a step; chance depends on the place alone."""

import math

import pytest

from lit_qlora.callbacks.steps import SeedByPosition, StepCallback


class Steps(StepCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, trainer, module):
        self.steps.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_called_once_after_each_step(trainer, tiny, rows, accumulate):
    steps = Steps()
    trainer(steps, accumulate_grad_batches=accumulate, max_epochs=2).fit(tiny(), datamodule=rows(10))
    # 10 micro-batches: with 3 to a step, the last step of each epoch has one.
    ends = list(range(1, 21)) if accumulate == 1 else [3, 6, 9, 10, 13, 16, 19, 20]
    assert steps.steps == list(enumerate(ends, 1))
    assert len(ends) == 2 * math.ceil(10 / accumulate)


def test_it_comes_before_the_validation_that_follows(trainer, tiny, rows):
    told = []

    class Tells(Steps):
        def on_step_end(self, trainer, module):
            told.append(trainer.global_step)

        def on_validation_start(self, trainer, pl_module):
            told.append("validation")

    trainer(Tells(), val_check_interval=2, limit_train_batches=4).fit(tiny(), datamodule=rows(4))
    assert told == [1, 2, "validation", 3, 4, "validation"]


def fitted(trainer, tiny, rows, seed, **options):
    module = tiny()
    callbacks = [] if seed is None else [SeedByPosition(seed)]
    trainer(*callbacks, max_epochs=2, **options).fit(module, datamodule=rows(6))
    return module.chance


def test_a_validation_in_between_does_not_change_chance(trainer, tiny, rows):
    undisturbed = fitted(trainer, tiny, rows, 1, limit_val_batches=0)
    assert fitted(trainer, tiny, rows, 1, val_check_interval=2) == undisturbed
    assert fitted(trainer, tiny, rows, 1, val_check_interval=5) == undisturbed


def test_every_place_and_every_seed_draws_otherwise(trainer, tiny, rows):
    first, second = (fitted(trainer, tiny, rows, seed, limit_val_batches=0) for seed in (1, 2))
    assert len({*first, *second}) == 24
