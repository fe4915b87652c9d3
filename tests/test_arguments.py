"""Arguments of the classes that a script builds: a path where one is meant, one line for what is of another type."""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lit_qlora import ChatDataModule, QLoRAModule, demo
from lit_qlora.arguments import checked_arguments
from lit_qlora.callbacks.guards import UpdateGuard
from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.errors import UserError
from lit_qlora.trainer import QLoRATrainer
from tests.expect import ExpectError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_path_stands_for_a_text_where_one_is_meant(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    built = QLoRAModule(base=demo.BASE, quantized_cache=tmp_path)
    assert (built.base.name, built.quantized_cache) == (str(demo.BASE), str(tmp_path))
    assert built.options["base"] == str(demo.BASE)  # which a checkpoint keeps, and a path would be no plain value
    rows = ChatDataModule(
        demo.TRAIN,
        validation_source=demo.TEST,
        test_source=demo.TEST,
        template=tmp_path / "own.jinja",
        tokenizer=demo.BASE,
        max_length=96,
    )
    assert rows.prompt_format.source == TEMPLATE
    rows.setup("validate")
    assert {rows.source, rows.validation_source, rows.test_source} == {str(demo.TRAIN), str(demo.TEST)}


def test_an_adapter_is_named_by_a_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is no adapter"):
        QLoRAModule(adapter=tmp_path / "none")


@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_numbers_of_numpy_and_tuples_stand_for_pythons(kind: type) -> None:
    built = QLoRAModule(rank=kind(4), alpha=np.float32(8), target_modules=("q_proj", "v_proj"))
    assert (built.lora.rank, built.lora.alpha) == (4, 8.0)
    assert {type(built.lora.rank), type(built.lora.alpha)} == {int, float}
    assert built.lora.target_modules == ["q_proj", "v_proj"]


PAGE = torch.zeros(40, 40)

WRONG = [
    (QLoRAModule, "model.base", 5, "a text or a path, got 5"),
    (QLoRAModule, "model.base", b"demo", "got a bytes"),
    (QLoRAModule, "model.adapter", True, "a text or a path or none, got True"),
    (QLoRAModule, "model.rank", 4.5, "a whole number, got 4.5"),
    (QLoRAModule, "model.rank", "x", "got 'x'"),
    (QLoRAModule, "model.rank", True, "got True"),
    (QLoRAModule, "model.rank", PAGE, "got a Tensor"),
    (QLoRAModule, "model.alpha", None, "a number, got None"),
    (QLoRAModule, "model.dropout", "a", "a number"),
    (QLoRAModule, "model.dropout", Decimal("0.1"), "a Decimal"),
    (QLoRAModule, "model.target_modules", None, "a text or a list of texts"),
    (QLoRAModule, "model.target_modules", ["q_proj", 3], "got ['q_proj', 3]"),
    (QLoRAModule, "model.target_modules", Path("q_proj"), "a list of texts"),
    (QLoRAModule, "model.rslora", "yes", "true or false"),
    (QLoRAModule, "model.schedule", "stairs", "constant, linear, cosine"),
    (QLoRAModule, "model.schedule", "liner", "did you mean 'linear'?"),
    (QLoRAModule, "model.compile", "yes", "true or false or auto"),
    (ChatDataModule, "data.source", 3, "a text or a path or a list of values or a table, got 3"),
    (ChatDataModule, "data.source", [3], "got [3]"),
    (ChatDataModule, "data.validation_source", iter([{"text": "a"}]), "for rows themselves, write them to a file"),
    (ChatDataModule, "data.columns", ["a"], "a table or none, got ['a']"),
    (ChatDataModule, "data.train_on", "x", "answers, all"),
    (ChatDataModule, "data.form", None, "sharegpt"),
    (ChatDataModule, "data.system", Path("be.txt"), "a text or none"),
    (ChatDataModule, "data.template", 5, "a text or a path or none"),
    (ChatDataModule, "data.max_length", "x", "a whole number"),
    (ChatDataModule, "data.batch_tokens", 2e3, "a whole number or none"),
    (ChatDataModule, "data.tokenizer", SimpleNamespace(page="x" * 9999), "got a SimpleNamespace"),
    (ChatDataModule, "data.tokenizer", 5, "a text or a path or none, got 5"),
    (SampleAnswers, "samples.prompts", "What?", "a list of texts or none"),
    (SampleAnswers, "samples.count", None, "a whole number"),
    (QLoRATrainer, "trainer.max_epochs", "x", "a whole number"),
    (QLoRATrainer, "trainer.precision", "32", "32-true"),
    (UpdateGuard, "max_nonfinite_losses", 1.5, "a whole number"),
]


@pytest.mark.parametrize(("kind", "option", "value", "words"), WRONG)
def test_an_argument_of_another_type_is_one_line(
    kind: Any, option: str, value: Any, words: str, expect_error: ExpectError
) -> None:
    error = expect_error(lambda: kind(**{option.rpartition(".")[2]: value}), words, option=option)
    assert len(str(error)) < 250


def test_all_that_an_annotation_says_passes_as_it_is() -> None:
    taken = []

    class Kind:
        @checked_arguments("some")
        def __init__(self, number: float, either: bool | str = True, *, others: Any = None, **more: int) -> None:
            taken.append((number, either, others, more))

    Kind(3)
    Kind(Fraction(1, 2), "auto", others=PAGE, free="as it was")  # type: ignore[arg-type]
    assert [repr(one) for one in taken[0]] == ["3", "True", "None", "{}"]
    assert taken[1] == (0.5, "auto", PAGE, {"free": "as it was"})


def test_an_argument_that_there_is_not_is_named_as_python_does() -> None:
    with pytest.raises(TypeError, match=r"QLoRAModule.__init__\(\) got an unexpected keyword argument 'lr'"):
        QLoRAModule(lr=1)  # type: ignore[call-arg]
