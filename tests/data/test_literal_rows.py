"""Each form of row becomes these very ids and labels: Llama 2's, in its format; nothing here is computed."""

import json

import pytest

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.encode import Encoder
from lit_qlora.data.records import Reading, load_records
from lit_qlora.data.templates import read_template
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.text.formats import make_format
from tests.data.talks import said
from tests.llama3_like import write_base

ROWS = {
    "alpaca": {"instruction": "Name a colour.", "input": "", "output": "Red."},
    "alpaca with input": {"instruction": "Translate.", "input": "rouge", "output": "Red."},
    "alpaca with history": {"instruction": "Another.", "output": "Blue.", "system": "Be brief.",
                            "history": [["Name a colour.", "Red."]]},
    "dolly": {"instruction": "Where is it?", "context": "It is here.", "response": "Here.", "category": "closed_qa"},
    "prompt and completion": {"prompt": "Name a colour.", "completion": "Red."},
    "prompt and response": {"prompt": "Name a colour.", "response": "Red."},
    "question and answer": {"question": "Name a colour.", "answer": "Red."},
    "query and response": {"query": "Name a colour.", "response": "Red."},
    "input and output": {"input": "Name a colour.", "output": "Red."},
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."},
                              {"role": "assistant", "content": "Red."}]},
    "content parts and null": {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "42"}, {"role": "assistant", "content": "Red."}]},
    "ShareGPT with tools": {"conversations": [
        {"from": "human", "value": "Name a colour."}, {"from": "function_call", "value": "f()"},
        {"from": "observation", "value": "42"}, {"from": "gpt", "value": "Red."}]},
    "developer and model": {"messages": [{"role": "developer", "content": "Be brief."},
                                         {"role": "user", "content": "Name a colour."},
                                         {"role": "model", "content": "Red."}]},
    "Guanaco": {"text": "### Human: Name a colour.### Assistant: Red."},
    "Llama 2": {"text": "<s>[INST] Name a colour. [/INST] Red. </s>"},
    "plain text": {"text": "Red is a colour."},
    "other columns": {"Frage": "Name a colour.", "Antwort": "Red."},
}  # fmt: skip

IDS = {
    "alpaca": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "alpaca with input": [
        [1, 353, 317, 299, 304, 309, 310, 319, 367, 758, 341, 334, 376, 327, 272, 13, 13, 340, 371, 329, 327, 353,
         317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "alpaca with history": [
        [1, 353, 317, 299, 304, 309, 310, 319, 353, 286, 286, 309, 315, 309, 288, 288, 13, 292, 327, 372, 447, 327,
         328, 272, 13, 286, 286, 273, 309, 315, 309, 288, 288, 13, 13, 304, 421, 327, 356, 1022, 272, 353, 317, 273,
         299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
        [1, 353, 317, 299, 304, 309, 310, 319, 377, 336, 602, 505, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [440, 334, 343, 327, 272, 353, 2],
    ],
    "dolly": [
        [1, 353, 317, 299, 304, 309, 310, 319, 955, 365, 357, 342, 289, 13, 13, 299, 342, 365, 431, 375, 272, 353,
         317, 273, 299, 304, 309, 310, 319],
        [460, 359, 327, 272, 353, 2],
    ],
    "prompt and completion": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "prompt and response": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "question and answer": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "query and response": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "input and output": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "messages": [
        [1, 353, 317, 299, 304, 309, 310, 319, 353, 286, 286, 309, 315, 309, 288, 288, 13, 292, 327, 372, 447, 327,
         328, 272, 13, 286, 286, 273, 309, 315, 309, 288, 288, 13, 13, 304, 421, 327, 356, 1022, 272, 353, 317, 273,
         299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "content parts and null": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 13, 13, 278, 276, 353, 317, 273, 299,
         304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "ShareGPT with tools": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 13, 13, 278, 276, 353, 317, 273, 299,
         304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "developer and model": [
        [1, 353, 317, 299, 304, 309, 310, 319, 353, 286, 286, 309, 315, 309, 288, 288, 13, 292, 327, 372, 447, 327,
         328, 272, 13, 286, 286, 273, 309, 315, 309, 288, 288, 13, 13, 304, 421, 327, 356, 1022, 272, 353, 317, 273,
         299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "Guanaco": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "Llama 2": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
    "plain text": [
        [1],
        [601, 327, 326, 365, 356, 1022, 272, 2],
    ],
    "other columns": [
        [1, 353, 317, 299, 304, 309, 310, 319, 529, 421, 327, 356, 1022, 272, 353, 317, 273, 299, 304, 309, 310, 319],
        [601, 327, 326, 272, 353, 2],
    ],
}  # fmt: skip
"""Ids that are ignored and ids that are learned, by turns, for each row."""


@pytest.mark.parametrize("name", ROWS)
def test_ids_and_labels_are_these(name, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[name]]))
    whole = name == "plain text"
    columns = {"user": "Frage", "assistant": "Antwort"} if name == "other columns" else None
    records = load_records(str(path), reading=Reading(columns=columns, is_whole=whole, strict=True))
    encoder = Encoder(load_tokenizer("demo"), 1024, "all" if whole else "answers")
    (example,) = encoder.examples(records.conversations)
    assert example.input_ids == [id_ for part in IDS[name] for id_ in part]
    assert example.labels == [
        id_ if number % 2 else IGNORE_INDEX for number, part in enumerate(IDS[name]) for id_ in part
    ]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "text" not in row and "Frage" not in row])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("around", ["{}", '{{"data": {}}}'])
def test_a_list_of_rows_is_not_one_conversation(name, count, around, tmp_path):
    """A list of one pair is a row, as alpaca_data.json is written."""
    path = tmp_path / "rows.json"
    path.write_text(around.format(json.dumps([ROWS[name]] * count)))
    found = load_records(str(path), reading=Reading(strict=True)).conversations
    path.with_suffix(".jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    assert found == load_records(str(path.with_suffix(".jsonl"))).conversations * count


IDS_OF_FORMATS = {
    "llama2": [
        [1, 353, 317, 299, 304, 309, 310, 319, 353, 286, 286, 309, 315, 309, 288, 288, 13, 292, 327, 372, 447, 327, 328,
         272, 13, 286, 286, 273, 309, 315, 309, 288, 288, 13, 13, 291, 336, 336, 353, 317, 273, 299, 304, 309, 310,
         319],
        [367, 381, 353, 2],
        [1, 353, 317, 299, 304, 309, 310, 319, 645, 353, 317, 273, 299, 304, 309, 310, 319],
        [476, 343, 327, 353, 2],
    ],
    "alpaca": [
        [1, 440, 327, 372, 447, 327, 328, 272, 13, 13, 261, 261, 261, 415, 418, 340, 343, 638, 331, 409, 284, 13, 291,
         336, 336, 13, 13, 261, 261, 261, 601, 360, 338, 409, 478, 284, 13],
        [310, 381, 2],
        [353, 13, 13, 261, 261, 261, 415, 418, 340, 343, 638, 331, 409, 284, 13, 313, 520, 13, 13, 261, 261, 261, 601,
         360, 338, 409, 478, 284, 13],
        [309, 343, 327, 2],
    ],
    "chatml": [
        [1, 353, 286, 350, 864, 321, 418, 368, 342, 350, 288, 341, 413, 342, 327, 335, 13, 292, 327, 372, 447, 327, 328,
         272, 286, 350, 864, 321, 327, 364, 350, 288, 13, 286, 350, 864, 321, 418, 368, 342, 350, 288, 343, 341, 359,
         13,
         291, 336, 336, 286, 350, 864, 321, 327, 364, 350, 288, 13, 286, 350, 864, 321, 418, 368, 342, 350, 288, 441,
         341, 331, 418, 403, 342, 13],
        [310, 381, 2],
        [353, 13, 286, 350, 864, 321, 418, 368, 342, 350, 288, 343, 341, 359, 13, 313, 520, 286, 350, 864, 321, 327,
         364, 350, 288, 13, 286, 350, 864, 321, 418, 368, 342, 350, 288, 441, 341, 331, 418, 403, 342, 13],
        [309, 343, 327, 2],
    ],
    "plain": [
        [1, 440, 327, 372, 447, 327, 328, 272, 13, 13, 291, 336, 336],
        [367, 381, 2],
        [1, 645],
        [476, 343, 327, 2],
    ],
    "vicuna": [
        [1, 440, 327, 372, 447, 327, 328, 272, 584, 309, 295, 308, 284, 377, 336, 336, 377, 309, 309, 299, 309, 310,
         291, 304, 310, 284],
        [367, 381, 2],
        [584, 309, 295, 308, 284, 645, 377, 309, 309, 299, 309, 310, 291, 304, 310, 284],
        [476, 343, 327, 2],
    ],
    "zephyr": [
        [1, 353, 286, 350, 341, 413, 342, 327, 335, 350, 288, 13, 292, 327, 372, 447, 327, 328, 272, 2, 353, 13, 286,
         350, 343, 341, 359, 350, 288, 13, 291, 336, 336, 2, 353, 13, 286, 350, 441, 341, 331, 418, 403, 342, 350, 288,
         13],
        [310, 381, 2],
        [353, 13, 286, 350, 343, 341, 359, 350, 288, 13, 313, 520, 2, 353, 13, 286, 350, 441, 341, 331, 418, 403, 342,
         350, 288, 13],
        [309, 343, 327, 2],
    ],
    "llama3": [
        [256, 258, 82, 88, 82, 83, 68, 76, 259, 198, 198, 33, 68, 220, 65, 81, 72, 68, 69, 13, 260, 258, 84, 82, 68, 81,
         259, 198, 198, 32, 77, 77, 260, 258, 64, 82, 82, 72, 82, 83, 64, 77, 83, 259, 198, 198],
        [51, 78, 76, 260],
        [258, 84, 82, 68, 81, 259, 198, 198, 54, 71, 78, 260, 258, 64, 82, 82, 72, 82, 83, 64, 77, 83, 259, 198, 198],
        [50, 84, 68, 260],
    ],
}  # fmt: skip
"""The same of two rounds with a system text, in each format: Llama 3's with a tokenizer that has its marks."""


@pytest.mark.parametrize("name", IDS_OF_FORMATS)
def test_ids_and_labels_of_each_format_are_these(name, tmp_path):
    tokenizer = load_tokenizer(str(write_base(tmp_path)) if name == "llama3" else "demo")
    encoder = Encoder(tokenizer, 1024, prompt_format=make_format(read_template(name)))
    (example,) = encoder.examples([said("Ann", "Tom", "Who", "Sue", system="Be brief.")])
    ids = IDS_OF_FORMATS[name]
    assert example.input_ids == [id_ for part in ids for id_ in part]
    assert example.labels == [id_ if number % 2 else IGNORE_INDEX for number, part in enumerate(ids) for id_ in part]
