"""Owns how the embedded demo is made: conversations, tokenizer and tiny base, from nothing but a seed.

    python -m scripts.demo.build [--output DIR] [--seed 0] [--steps 1100]

Takes about six minutes on two quiet CPU cores. The base only ever reads running prose, in windows cut
anywhere: the end-of-text token is never a target, so it never stops by itself. It overhears people ask
and answer, but is never asked, and of the held-out names it reads plain sentences alone. What
fine-tuning adds is thus plain to see. Any text can be taught, also in tokens that the base never met.
Knows nothing of prompts, of 4 bits or of LoRA.
"""

import argparse
import itertools
import json
import random
import re
import string
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from lit_qlora.demo import BASE
from scripts.demo.world import Row, World

VOCABULARY = 1024
SPECIAL = ["<unk>", "<s>", "</s>"]
UNK, BOS, EOS = range(3)

WINDOW = 192  # tokens: longer than the longest conversation, so that no position is new to the base
ROWS = 24  # windows per step
PEAK_RATE = 3e-3


def guanaco_text(row: Row) -> str:
    """The conversation ``row`` in openassistant-guanaco's form: ``### Human: …### Assistant: …``."""
    return "".join(f"### Human: {question}### Assistant: {answer}" for question, answer in row)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write ``rows`` to ``path``, one ``{"text": …}`` per line."""
    lines = (json.dumps({"text": guanaco_text(row)}) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def assert_held_out(world: World, train: list[Row], test: list[Row]) -> None:
    """Assert that no held-out question, and no name that one asks about, stands in the training rows.

    Args:
        world: The world whose names are held out.
        train: Training rows.
        test: Held-out rows.
    """
    asked = {question for row in train for question, _ in row}
    assert not asked & {question for row in test for question, _ in row}, "a held-out question is trained on"
    words = set(re.findall(r"\w+", " ".join(map(guanaco_text, train))))
    names = {subject.name for pair in world.held_out for subject in pair}
    assert not words & names, f"held-out names in the training rows: {words & names}"


def train_tokenizer(texts: Iterator[str]) -> LlamaTokenizer:
    """Train a tokenizer of Llama's kind: BPE on words that carry their space, bytes for all that it has not seen.

    Ids are as in Llama 2: <unk> 0, <s> 1, </s> 2, the 256 bytes from 3, then the learned pieces.

    Args:
        texts: Texts to learn the pieces from.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    # Learned on single words and signs, so that a name has the same ids before "?" as before ".".
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(bytes_),
        initial_alphabet=sorted(set(string.printable) - set(string.whitespace)),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = SPECIAL + bytes_ + sorted(learned["vocab"], key=learned["vocab"].get)
    assert len(pieces) == VOCABULARY, f"the corpus gives {len(pieces)} pieces, not {VOCABULARY}"
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]], add_bos_token=True)


def new_model() -> LlamaForCausalLM:
    """1.6 million weights; all sides of linear layers are multiples of 64, a block of 4-bit weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def windows(world: World, tokenizer: LlamaTokenizer, rng: random.Random) -> Iterator[torch.Tensor]:
    """Yield batches of running prose without end; each row opens with BOS and is cut anywhere.

    Args:
        world: The world that the prose is about.
        tokenizer: Tokenizer of the base.
        rng: Source of chance.

    Returns:
        [ROWS, WINDOW + 1] ids (int64).
    """
    sentences = world.prose(rng)
    per_window = WINDOW // 6  # a sentence has more than 6 tokens
    while True:
        texts = [" ".join(itertools.islice(sentences, per_window)) for _ in range(ROWS)]
        encoded = tokenizer(texts, add_special_tokens=False).input_ids
        yield torch.tensor([[BOS, *ids[:WINDOW]] for ids in encoded])


def pretrain(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], num_steps: int) -> torch.Tensor:
    """Train a model on next tokens with AdamW: a short warm-up, then a cosine down to zero.

    Args:
        model: The model, changed in place.
        batches: [ROWS, WINDOW + 1] ids of each step.
        num_steps: Number of steps.

    Returns:
        [VOCABULARY] bool: the tokens that were a target.
    """
    met = torch.zeros(VOCABULARY, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, num_steps, pct_start=0.05)
    start = time.perf_counter()
    for step, ids in enumerate(itertools.islice(batches, num_steps), 1):
        met[ids[:, 1:]] = True
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps:
            seconds = time.perf_counter() - start
            print(f"step {step:5d} of {num_steps}   loss {loss.item():.3f}   {seconds:4.0f} s", flush=True)
    return met


def part_unmet(model: LlamaForCausalLM, met: torch.Tensor, seed: int) -> None:
    """Give each token that was never a target a direction of its own in the output head.

    Training pushes the rows of all these tokens (end of text, digits, most bytes, rare signs) the same way,
    until they can hardly be distinguished, and an adapter, which leaves the head as it is, could make none of
    them likelier than the others.

    Args:
        model: The pretrained base, in the dtype that it is saved in.
        met: [VOCABULARY] bool, the tokens that were a target.
        seed: Of the directions.
    """
    # The end of text draws first: its direction depends on the seed alone.
    unmet = sorted((~met).nonzero().flatten().tolist(), key=lambda token: token != EOS)
    rows = model.lm_head.weight.data
    noise = torch.randn(len(unmet), rows.shape[1], generator=torch.Generator().manual_seed(seed))
    rows[unmet] += (0.1 * noise).to(rows.dtype)


def build(output: Path, seed: int, num_steps: int) -> None:
    """Make the demo's base, tokenizer and rows, and print the files' sizes.

    Args:
        output: Folder for base/, train.jsonl and test.jsonl.
        seed: Seed of world, rows and weights.
        num_steps: Number of pretraining steps.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    world = World(seed)
    train, test = world.train_rows(rng), world.test_rows(rng)
    assert_held_out(world, train, test)
    prose = itertools.islice(world.prose(rng), 20_000)
    chat = (text for row in train for pair in row for text in pair)
    tokenizer = train_tokenizer(itertools.chain(prose, chat))
    model = new_model()
    print(f"{len(train)} training rows, {len(test)} held out; {model.num_parameters():,} weights")
    met = pretrain(model, windows(world, tokenizer, rng), num_steps)

    base = output / "base"
    base.mkdir(parents=True, exist_ok=True)
    write_rows(output / "train.jsonl", train)
    write_rows(output / "test.jsonl", test)
    tokenizer.save_pretrained(base)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
    part_unmet(model.half(), met, seed)
    model.save_pretrained(base)
    files = [*sorted(base.iterdir()), output / "train.jsonl", output / "test.jsonl"]
    for file in files:
        print(f"{file.stat().st_size:9,d} bytes  {file.relative_to(output)}")
    print(f"{sum(file.stat().st_size for file in files):9,d} bytes in all, in {output}")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Makes the embedded demo from nothing.")
    parser.add_argument("--output", type=Path, default=BASE.parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1100, help="optimizer steps of the base's training")
    options = parser.parse_args()
    build(options.output, options.seed, options.steps)


if __name__ == "__main__":
    main()
