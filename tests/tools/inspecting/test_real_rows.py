"""inspect on real rows with the real Llama 2 tokenizer: its figures against such as were counted without it."""

import json
import re
import statistics
from itertools import pairwise

import pytest

from lit_qlora.cli import main
from lit_qlora.model.shape import LLAMA_2_SIZES

pytestmark = pytest.mark.slow

GUANACO_1K, GUANACO_259 = "guanaco-llama2-1k.train.parquet", "openassistant_best_replies_eval_first259.jsonl"


@pytest.fixture(scope="module")
def base(real, tmp_path_factory) -> str:
    """Llama 2's tokenizer beside a config.json: there are no weights."""
    folder = tmp_path_factory.mktemp("base")
    for file in (real / "llama2-tokenizer").iterdir():
        (folder / file.name).symlink_to(file)
    config = LLAMA_2_SIZES["7b"] | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.fixture
def inspect(base, real, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def inspect(source, *args, cap=1024, status=1):
        options = ["--model.base", base, "--data.source", str(real / "guanaco" / source), "--data.max_length", str(cap)]
        assert main(["inspect", *options, "--rows", "1", *args]) == status
        return capsys.readouterr().out

    return inspect


def figure(text: str, title: str) -> int:
    """Training and held out together."""
    (line,) = re.findall(rf"^ *{title} +([\d,]+) +([\d,]+)$", text, re.MULTILINE)
    return sum(int(value.replace(",", "")) for value in line)


def padding(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"^  batch_.* ([\d.]+)%", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def counted(real) -> dict[str, list[int]]:
    """Tokens of each row of the 1,000, and of each answer with its EOS, by Meta's rule and no code of this project."""
    import pyarrow.parquet
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real / "llama2-tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts = pyarrow.parquet.read_table(real / "guanaco" / GUANACO_1K).column("text").to_pylist()
    whole, answers = [], []
    for text in texts:
        pairs = [pair.split("[/INST]") for pair in text.replace("<s>", "").split("[INST]")[1:]]
        said = [
            (f"[INST] {asked.strip()} [/INST]", f"{answer.replace('</s>', '').strip()} ") for asked, answer in pairs
        ]
        sizes = [[len(tokenizer.encode(part, add_special_tokens=False).ids) for part in pair] for pair in said]
        whole.append(sum(sum(pair) + 2 for pair in sizes))
        answers.append(sum(pair[1] + 1 for pair in sizes))
    return {"whole": whole, "answers": answers}


def test_the_1000_rows(inspect, counted):
    """Three of them hold an empty turn, and are left out; without them, the figures are those of the whole file."""
    empty = [434, 510, 899]
    text = inspect(GUANACO_1K, cap=4096)
    kept = [size for number, size in enumerate(counted["whole"]) if number not in empty]
    assert figure(text, "rows") == 1000
    assert figure(text, "tokens before any cut") == sum(kept)
    for number in empty:
        assert f"row {number + 1}:" in " ".join(text.split())
    ordered = sorted(kept)
    words = f"mean {statistics.mean(kept):,.0f}, median {statistics.median(kept):,.0f}, 95 % up to {ordered[947]:,}"
    assert f"{words}, longest 7,832: " in " ".join(text.split())
    assert "row 958" in text  # the longest
    # What was published of the whole file, with the three.
    assert (sum(counted["whole"]), max(counted["whole"])) == (461_907, 7832)
    assert [sum(size > cap for size in counted["whole"]) for cap in (512, 1024)] == [299, 72]


def test_the_1000_rows_and_their_cap(inspect, counted):
    text = inspect(GUANACO_1K)
    assert re.search(r"data\.max_length 1,024: 72 are longer, ", text)
    counts = {int(last.replace(",", "")): int(size) for last, size in re.findall(r"to +([\d,]+) +(\d+) ", text)}
    kept = [size for number, size in enumerate(counted["whole"]) if number not in (434, 510, 899)]
    edges = [0, 128, 256, 384, 512, 640, 768, 896, 1024, 2048, 4096, 8192]
    assert counts == {last: sum(first < size <= last for size in kept) for first, last in pairwise(edges)}
    # Every row that is too long is named by its number, unless all that falls off are whole turns.
    numbers = {number + 1 for number, size in enumerate(counted["whole"]) if size > 1024}
    found = {*map(int, re.findall(r"row (\d+): answer \d+ is cut", " ".join(text.split())))}
    also = re.search(r"also [^:]+: ([\d, ]+)", " ".join(text.split()))
    found |= {*map(int, also[1].replace(",", "").split())} if also else set()
    assert found <= numbers and len(numbers - found) == 4


@pytest.mark.parametrize(("cap", "most"), [(512, 1.0), (1024, 2.0), (2048, 3.0)])
def test_padding_is_what_was_measured(cap, most, inspect):
    """0.99, 0.98 and 0.97 of all tokens were real, four rows of like length at a time, on rows as long as these."""
    by_rows, by_tokens, packed = padding(inspect(GUANACO_1K, cap=cap))
    assert by_rows == pytest.approx(most, abs=0.7) and packed == 0.0 and by_tokens < 3


def test_all_answer_tokens_are_learned_where_nothing_is_cut(inspect, counted):
    """The base's context is long enough for all."""
    text = inspect(GUANACO_1K, "--accept", "unread,end,nothing", cap=4096, status=0)
    kept = [
        pair
        for number, pair in enumerate(zip(counted["whole"], counted["answers"], strict=True))
        if number not in (434, 510, 899)
    ]
    fits = sum(answers for size, answers in kept if size <= 4096)
    assert fits <= figure(text, "answer tokens, learned") <= fits + sum(size > 4096 for size, _ in kept) * 4096


def test_the_259_rows(inspect, real):
    rows = [json.loads(line)["text"] for line in (real / "guanaco" / GUANACO_259).read_text("utf-8").splitlines()]
    turns = [len(re.findall(r"### (?:Human|Assistant):", text)) for text in rows]
    text = inspect(GUANACO_259)
    assert figure(text, "rows") == len(rows) == 259
    unanswered = sum(text.rindex("### Human:") > text.rindex("### Assistant:") for text in rows)
    dropped = [int(count) for count in re.findall(r"(\d+)  unanswered last turns dropped", text)]
    assert sum(dropped) == unanswered == 64
    assert figure(text, "turns") == sum(turns) - unanswered
    assert re.search(r"16 are longer", text)
    assert inspect(GUANACO_259, cap=4096, status=0).count("verdict: as it should be") == 1


def test_demo_is_fine_by_every_built_in_format(capsys, monkeypatch, tmp_path):
    from lit_qlora.text.formats import built_in

    monkeypatch.chdir(tmp_path)
    for name in {*built_in()} - {"llama3"}:  # whose special tokens the demo's tokenizer lacks
        assert main(["inspect", "--data.template", name, "--data.max_length", "400", "--rows", "0"]) == 0, (
            capsys.readouterr().out
        )
