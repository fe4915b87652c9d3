"""Each form of row becomes these very ids and labels: Llama 2's, in its format; nothing here is computed."""

import json

import pytest

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.encode import Encoder
from lit_qlora.data.records import Reading, load_records
from lit_qlora.data.tokenizer import load_tokenizer

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
"""Of each row, ids that are ignored and ids that are learned, by turns."""


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
    """As alpaca_data.json is written: a pair that stands in a list by itself is a row."""
    path = tmp_path / "rows.json"
    path.write_text(around.format(json.dumps([ROWS[name]] * count)))
    found = load_records(str(path), reading=Reading(strict=True)).conversations
    path.with_suffix(".jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    assert found == load_records(str(path.with_suffix(".jsonl"))).conversations * count
