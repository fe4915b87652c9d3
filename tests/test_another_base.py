"""An adapter and a run belong to one base: a child of it, or one with a single other weight, every verb refuses."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.storage.weight_files import write_shards

SHORT = ["--trainer.val_check_interval", "100", "--trainer.limit_val_batches", "1", "--samples.count", "0",
         "--save_every_steps", "2"]  # fmt: skip
DOUBLED = {
    "query": "model.layers.0.self_attn.q_proj.weight",
    "embeddings": "model.embed_tokens.weight",
    "norm": "model.layers.1.post_attention_layernorm.weight",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo that was cut short at step 2, and bases that are nearly its own."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", "--run", "./run", "--trainer.max_steps", "2", *SHORT]) == 0
        assert main(["merge", "--run", "./run", "--output", "merged"]) == 0
    for file in demo.BASE.glob("tokenizer*"):  # the merged one's has a chat template, and is refused by itself
        shutil.copyfile(file, place / "merged" / file.name)
    for name, weight in DOUBLED.items():
        shutil.copytree(demo.BASE, place / name)
        tensors = load_file(demo.BASE / "model.safetensors")
        tensors[weight] *= 2
        save_file(tensors, place / name / "model.safetensors", {"format": "pt"})
    shutil.copytree(demo.BASE, place / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    write_shards(place / "sharded", load_file(demo.BASE / "model.safetensors").items(), shard_bytes=10**6)
    return place


def commands(base: str) -> dict[str, list[str]]:
    return {
        "chat": ["chat", "--adapter", "run/adapter", "--base", base, "--prompt", "Hello"],
        "merge": ["merge", "--adapter", "run/adapter", "--base", base, "--output", "out"],
        "fit": ["fit", "--run", "./other", "--model.adapter", "run/adapter", "--model.base", base,
                "--trainer.max_steps", "1", *SHORT],
        "resume": ["fit", "--run", "./run", "--model.base", base, "--trainer.max_steps", "3", *SHORT],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "base"),
    [(verb, base) for verb in ("chat", "resume") for base in ("merged", *DOUBLED)]
    + [(verb, base) for verb in ("merge", "fit") for base in ("merged", "query")],
)
def test_another_base_is_refused(
    place: Path, verb: str, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = (place / "run/adapter/manifest.json").read_bytes()
    assert main(commands(base)[verb]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    digits = r"\([0-9a-f]{12}\)"
    expected = {
        "resume": rf"error: run: its base changed: demo {digits} -> {base} {digits}; give that base with --model.base, "
    }.get(
        verb,
        rf"error: run/adapter: this adapter was trained on demo {digits}, the base given is {base} {digits}; give ",
    )
    assert re.match(expected, line)
    assert not (place / "out").exists() and not (place / "other").exists()
    assert (place / "run/adapter/manifest.json").read_bytes() == before


def test_the_same_base_elsewhere_and_in_pieces_is_accepted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list((place / "sharded").glob("*.safetensors"))) > 1
    monkeypatch.chdir(place)
    shutil.copytree("run", "again")
    command = commands("sharded")
    assert main(["merge", "--adapter", "run/adapter", "--base", "sharded", "--output", "fine"]) == 0
    assert main(["fit", "--run", "./again", *command["resume"][3:]]) == 0
    assert main(["fit", "--run", "./another", *command["fit"][3:]]) == 0
