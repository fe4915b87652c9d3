"""Owns the verb predict: a file of prompts in, a jsonl of answers out, in the same order. Knows no model."""

import json
from pathlib import Path
from typing import Any

from lit_qlora.data.files import read_rows
from lit_qlora.errors import UserError, require
from lit_qlora.model.generate import Sampling
from lit_qlora.text import llama2, messages
from lit_qlora.text.conversation import Conversation, Turn


def predict(
    prompts: str,
    output: str,
    run: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> None:
    """Answer a file of prompts with a run's best adapter.

    Args:
        prompts: txt (a prompt a line), or jsonl, json, csv, parquet with a column prompt (and, if you like,
            system) or messages.
        output: the jsonl to write: prompt, answer, and whether the answer ended by itself.
        run: run folder; default: the newest run.
        adapter: an adapter folder instead of a run.
        base: the base of that adapter; default: the one that the folder names.
        max_new_tokens: tokens of an answer, at most.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this share.
        seed: of sampling.
        batch_size: prompts answered at a time.
    """
    require(max_new_tokens >= 1, "max_new_tokens", "at least 1", max_new_tokens)
    require(temperature >= 0, "temperature", "0 or more", temperature)
    require(0 < top_p <= 1, "top_p", "a share above 0, at most 1", top_p)
    require(batch_size >= 1, "batch_size", "at least 1", batch_size)
    target = Path(output)
    if target.exists():
        raise UserError(f"output: {target} exists already; give another name or remove it")
    if not target.parent.is_dir():
        raise UserError(f"output: no folder {target.parent}")
    conversations = read_prompts(Path(prompts))

    from lit_qlora.tools.answerer import Answerer

    answerer = Answerer(run, adapter, base)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    unfinished = target.with_name(f".{target.name}.part")
    with unfinished.open("w", encoding="utf-8") as file:
        for start in range(0, len(conversations), batch_size):
            some = conversations[start : start + batch_size]
            for conversation, answer in zip(some, answerer.answer(some, sampling), strict=True):
                line = {"prompt": conversation.turns[-1].content, "answer": answer.text, "stopped": answer.stopped}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(target)
    print(f"{len(conversations)} answers by {answerer.adapter} in {target}")


def read_prompts(path: Path) -> list[Conversation]:
    """The open prompts of a file.

    Raises UserError naming file and line for what is no prompt.
    """
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror})") from error
        rows: list[tuple[str, Any]] = [
            (f"{path}:{number}", {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip()
        ]
    else:
        rows = [(row.where, row.value) for row in read_rows(path)]
    if not rows:
        raise UserError(f"{path}: no prompt in it")
    return [_prompt(where, row) for where, row in rows]


def _prompt(where: str, row: Any) -> Conversation:
    try:
        if isinstance(row, dict) and row.get("messages"):
            conversation = messages.parse(row["messages"])
        elif isinstance(row, dict) and "prompt" in row:
            conversation = Conversation((Turn("user", row["prompt"]),), row.get("system") or None)
        else:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"expected a column prompt or messages, found {found}")
        if conversation.is_answered:
            raise ValueError("the last turn is the assistant's, expected the user's")
        llama2.segments(conversation)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return conversation
