"""Measure lit-qlora beside its peers: the same rows, rank, targets, optimizer and learned tokens, in one run.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py --cpu --quick           # at most 8 minutes on two cores
    python benchmarks/compare.py --t4 --base DIR         # a larger GPU under a T4's limits

Each peer runs in a process of its own, several times, in turns. Tokens that are not padding are counted, over whole
optimizer steps, after a warm-up, over at least one pass through the rows, since the time per token depends on their
length. Before the first step, and again after the last, each scores the same rows by its own loss, to show that the
work is equal. TRL's best settings are its length groups or its packing, whichever is quicker; Unsloth's its defaults,
its packing with either checkpointing, or none. They pack without flash attention, too, and the loss of the same rows
shows that no conversation sees another. Ends with a table and one line of JSON; with ``--output DIR`` both are kept
there, with a picture. ``--quick`` measures short rows, too, the demo's, where a step's fixed costs count: our defaults
beside each of TRL's settings, and the best beside the best.

With ``--kernels`` each process is profiled: instead of its wall clock, the kernels' time per token is reported, by
class, and what it projects for a T4 (see kernel_times.py).
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from asked import above_0, existing, hide_gpus, refuse_unused, require_gpus, whole

STARTED = time.monotonic()
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
PEERS = {
    "lit_qlora": "lit-qlora, its defaults",
    "lit_qlora_tokens": "lit-qlora, batches by tokens",
    "lit_qlora_packed": "lit-qlora, packing",
    "trl_default": "TRL SFTTrainer, its defaults",
    "trl_grouped": "TRL SFTTrainer, length groups",
    "trl_packed": "TRL SFTTrainer, packing",
    "plain": "transformers + peft, as QLoRA's script",
    "unsloth": "Unsloth, its defaults",
    "unsloth_packed": "Unsloth, packing",
    "unsloth_packed_plain": "Unsloth, packing, plain checkpointing",
    "unsloth_packed_kept": "Unsloth, packing, no checkpointing",
    "unsloth_kept": "Unsloth, no checkpointing, 2 rows at a time",
}
QUICK = ["lit_qlora", "lit_qlora_tokens", "trl_default", "trl_grouped", "trl_packed"]
QUICK_MINUTES = 7.5
"""Time of --quick, which begins no repetition that would not end within it."""
BEST = {
    "trl_best": ("trl_grouped", "trl_packed"),
    "unsloth_best": ("unsloth", "unsloth_packed", "unsloth_packed_plain", "unsloth_packed_kept", "unsloth_kept"),
}
"""Settings of each library, of which the quickest counts."""
OWN = ("lit_qlora", "lit_qlora_tokens", "lit_qlora_packed")
GUANACO = "timdettmers/openassistant-guanaco"
SHORT, SHORT_ROWS = "demo", 8
"""Short rows for ``--quick``, and how many of them for each of the others: about as many tokens."""
Results = dict[str, dict[str, list[dict]]]
"""What each process found, by kind of rows and peer."""
HELD_OUT_ROWS = 4
PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets", "trl", "unsloth", "liger-kernel")


def main() -> None:
    """Measure, and write what was found."""
    from lit_qlora.errors import UserError

    options = _options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            specs = _prepare_all(options, folder)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        results = _measure(options, specs)
    reports = {kind: _report(options, found) for kind, found in results.items()}
    report = reports[""] | {kind: found for kind, found in reports.items() if kind}
    table = "\n\n".join(f"{_heading(kind)}{_table(found)}" for kind, found in reports.items())
    print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "compare.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (options.output / "compare.md").write_text(table, encoding="utf-8")
        _picture(report, options.output / "compare.png")
    # Of --quick, time may be up before all of them; and of a peer, one may have failed.
    measured = [found for one in reports.values() for found in one["peers"].values() if "failed" not in found]
    ratios = {
        f"{kind}_{name}".lstrip("_"): value for kind, one in reports.items() for name, value in one["ratios"].items()
    }
    print(json.dumps(ratios | {"repetitions": min((found["repetitions"] for found in measured), default=0)}))
    failed = [peer for peer, found in report["peers"].items() if "failed" in found]
    if "lit_qlora" in failed or len(failed) == len(report["peers"]):
        sys.exit(f"not measured: {', '.join(failed)}")


def _prepare_all(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """What is to be measured, by kind of rows."""
    specs = {"": _prepare(options, folder)}
    if options.quick and options.data != SHORT:
        (folder / "short").mkdir()
        base = str(json.loads(specs[""].read_text(encoding="utf-8"))["base"])
        short = vars(options) | {"data": SHORT, "rows": options.rows * SHORT_ROWS, "base": base}
        specs["short"] = _prepare(argparse.Namespace(**short), folder / "short")
    return specs


def _heading(kind: str) -> str:
    return f"On {kind} rows:\n\n" if kind else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a small random Llama on the CPU")
    parser.add_argument("--t4", action="store_true", help="14.2 GiB, fp16, no flash or cuDNN attention")
    parser.add_argument("--quick", action="store_true", help="five peers, 8 rows, and 64 short ones")
    parser.add_argument(
        "--kernels", action="store_true", help="kernel time by class instead of the wall clock; on a GPU"
    )
    parser.add_argument("--base", help="folder or hub id; default: random weights, made for this run")
    parser.add_argument("--tokenizer", type=existing, help="of Llama 2, for a random base; default: the demo's")
    parser.add_argument("--data", default=GUANACO, help="as data.source")
    parser.add_argument("--rows", type=whole, help="conversations, from the first; default: 256, quick: 8")
    parser.add_argument("--max-length", type=whole, default=1024)
    parser.add_argument("--batch-size", type=whole, default=4)
    parser.add_argument("--rank", type=whole, default=16)
    words = "steps before the clock starts, at the end of one; default: 3, quick: 1, on a GPU a pass and 2"
    parser.add_argument("--warm-up", type=whole, help=words)
    parser.add_argument("--seconds", type=above_0, help="of timed steps, at least; default: 60, quick: 8")
    parser.add_argument("--repetitions", type=whole, default=3)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=None)
    parser.add_argument("--output", type=Path, help="folder for table, picture, figures and logs; default: none")
    options = parser.parse_args()
    if options.cpu:
        refuse_unused(parser, options, "--cpu", ["t4", "kernels"])
        hide_gpus()
    else:
        require_gpus(parser, 1, "give --cpu for a small base on the CPU")
    if options.base:
        refuse_unused(parser, options, "--base, which has its own", ["tokenizer"])
    options.rows = options.rows or (8 if options.quick else 256)
    options.seconds = options.seconds or (8 if options.quick else 60)
    if options.warm_up is None:  # a GPU's kernels are compiled, tuned and recorded when a length is first seen
        on_cpu = 1 if options.quick else 3
        options.warm_up = on_cpu if options.cpu else -(-options.rows // options.batch_size) + 2
    if options.peers is None:
        options.peers = QUICK if options.quick else list(PEERS)
    return options


def _prepare(options: argparse.Namespace, folder: Path) -> Path:
    """Base and rows for all: conversations for us, their very ids and labels for the others."""
    from random_base import make

    from lit_qlora import demo
    from lit_qlora.data.encode import Encoder
    from lit_qlora.data.records import load_records
    from lit_qlora.data.tokenizer import load_tokenizer
    from lit_qlora.errors import UserError

    tokenizer = options.tokenizer or Path(demo.BASE)
    base = options.base or str(
        make("small" if options.cpu else "7b", folder / "base", _tokenizer_only(tokenizer, folder))
    )
    try:
        records = load_records(options.data, "train")
    except UserError as error:
        if options.data != GUANACO:
            raise
        print(f"{error}: the demo's conversations instead", file=sys.stderr)
        options.data = "demo"
        records = load_records("demo", "train")
    conversations = records.conversations[: options.rows + HELD_OUT_ROWS]
    encoder = Encoder(load_tokenizer(base), max_length=options.max_length)
    chats, ids = [], []
    for conversation, example in zip(conversations, encoder.examples(conversations), strict=True):
        if example is None:
            continue
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        messages += [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        chats.append({"messages": messages})
        ids.append({"input_ids": example.input_ids, "labels": example.labels})
    # As many rows as asked for are trained on; ours wants some to hold out, and the others none.
    held_out, ids = chats[options.rows :], ids[: options.rows]
    if not held_out:
        problem = f"expected fewer than the {len(chats)} conversations of {options.data}, since one is held out"
        raise UserError(f"{problem}, got {options.rows}", option="rows")
    for name, rows in (("chats.jsonl", chats[: options.rows]), ("held_out.jsonl", held_out), ("ids.jsonl", ids)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = folder / "spec.json"
    plain = {key: value for key, value in vars(options).items() if isinstance(value, bool | int | float | str)}
    spec.write_text(
        json.dumps(
            plain
            | {"base": base, "chats": str(folder / "chats.jsonl"), "held_out": str(folder / "held_out.jsonl")}
            | {"ids": str(folder / "ids.jsonl"), "pass_tokens": sum(len(row["input_ids"]) for row in ids)}
        )
    )
    return spec


def _tokenizer_only(source: Path, folder: Path) -> Path:
    import shutil

    (folder / "tokenizer").mkdir()
    for file in source.glob("*token*"):
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    return folder / "tokenizer"


def _measure(options: argparse.Namespace, specs: dict[str, Path]) -> Results:
    results: Results = {kind: {peer: [] for peer in options.peers} for kind in specs}
    for repetition in range(options.repetitions):
        minutes = (time.monotonic() - STARTED) / 60
        if options.quick and repetition and minutes * (repetition + 1) / repetition > QUICK_MINUTES:
            print(f"stopped after {repetition} of {options.repetitions} repetitions: time is up", file=sys.stderr)
            break
        for kind, spec in specs.items():
            for peer in options.peers:
                found = _measure_one(options, peer, spec)
                results[kind][peer].append(found)
                words = found.get("failed") or _words(found)
                failed = "not measured: " if "failed" in found else ""
                turn = f"{repetition + 1}/{options.repetitions} {kind}".rstrip()
                print(f"{turn} {peer}: {failed}{words}", file=sys.stderr, flush=True)
    return results


def _measure_one(options: argparse.Namespace, peer: str, spec: Path) -> dict:
    command = [sys.executable, str(HERE / "peers.py"), peer, str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=spec.parent, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    if not done.returncode and last.startswith("{"):
        return json.loads(last)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{peer}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return {"failed": _reason(done.stderr or done.stdout)}


def _words(found: dict) -> str:
    speed = f"{found['tokens_per_second']:.0f} tokens/s"
    if "t4_tokens_per_second" in found:
        speed = f"{found['t4_tokens_per_second']:.0f} tokens/s projected for a T4"
    return (
        f"{speed}, padding {found['padding_share']:.0%}, loss of the same rows {found['loss']:.4f}, "
        f"then {found['loss_after']:.4f}, start {found['start_seconds']:.0f} s"
    )


def _reason(log: str) -> str:
    """The line of a log that says what went wrong."""
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no output"])[-1][:300]


def _report(options: argparse.Namespace, results: dict[str, list[dict]]) -> dict:
    from lit_qlora.figures.card import versions

    peers = {}
    for peer, runs in results.items():
        good = [run for run in runs if "failed" not in run]
        if not good:
            peers[peer] = {"failed": runs[0]["failed"]}
            continue
        speeds = [run["t4_tokens_per_second" if options.kernels else "tokens_per_second"] for run in good]
        peers[peer] = {
            "tokens_per_second": statistics.median(speeds),
            "range": [min(speeds), max(speeds)],
            "repetitions": len(good),
            **{
                key: good[-1][key]
                for key in ("loss", "loss_after", "padding_share", "start_seconds", "peak_gib", "precision", "steps")
            },
            **{key: good[-1][key] for key in ("us_per_token", "longest", "tflops", "gb_per_s") if key in good[-1]},
        }
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": _machine(),
        "versions": versions(PACKAGES),
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("output", "peers", "base", "tokenizer")
        },
        "peers": peers,
        "ratios": _ratios({peer: found.get("tokens_per_second", 0) for peer, found in peers.items()}),
    }


def _ratios(speeds: dict[str, float]) -> dict[str, float]:
    """How many times as many tokens a second we have: our default beside theirs, and the best of each beside ours."""
    own, best = speeds.get("lit_qlora", 0), max(speeds.get(name, 0) for name in OWN)
    defaults = {name: speeds.get(name, 0) for name in ("trl_default", "plain", "unsloth")}
    bests = {name: max(speeds.get(peer, 0) for peer in peers) for name, peers in BEST.items()}
    found = {f"ratio_to_{name}": (own, speed) for name, speed in (defaults | bests).items()}
    found |= {f"best_ratio_to_{name}": (best, speed) for name, speed in bests.items()}
    return {name: round(ours / theirs, 3) for name, (ours, theirs) in found.items() if ours and theirs}


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return f"{cpu or platform.processor()}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def _kernel_table(report: dict) -> list[str]:
    """Microseconds per token by class; empty without ``--kernels``."""
    from kernel_times import HOST, WAITS

    rows = {PEERS[peer]: found for peer, found in report["peers"].items() if "us_per_token" in found}
    if not rows:
        return []
    kinds = ("products", "dequantisation", "attention", "elementwise", "copies", WAITS, HOST)
    lines = ["", f"| kernels, µs per token | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for name, found in rows.items():
        lines.append(f"| {name} | {' | '.join(format(found['us_per_token'].get(kind, 0), '.1f') for kind in kinds)} |")
    first = next(iter(rows.values()))
    rates = f"this card sustained {first['tflops']:.0f} TFLOP/s and {first['gb_per_s']:,.0f} GB/s"
    return [*lines, "", f"Tokens/s are projected for a T4 from these; {rates}."]


def _table(report: dict) -> str:
    lines = [
        "| | tokens/s (median, range) | padding | peak GiB | loss of the same rows, before and after | start |",
        "|---|---|---|---|---|---|",
    ]
    for peer, found in report["peers"].items():
        if "failed" in found:
            lines.append(f"| {PEERS[peer]} | not measured: {found['failed'][:120]} | | | | |")
            continue
        low, high = found["range"]
        lines.append(
            f"| {PEERS[peer]} ({found['precision']}) | **{found['tokens_per_second']:,.0f}** "
            f"({low:,.0f} to {high:,.0f}) | {found['padding_share']:.0%} | {found['peak_gib']:.2f} "
            f"| {found['loss']:.4f}, {found['loss_after']:.4f} after {found['steps']} steps "
            f"| {found['start_seconds']:.0f} s |"
        )
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    return "\n".join([*lines, *_kernel_table(report), "", f"`{report['command']}` on {report['machine']}; {versions}."])


def _picture(report: dict, path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    measured = {PEERS[peer]: found for peer, found in report["peers"].items() if "failed" not in found}
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(measured) + 1.6))
    speeds = [found["tokens_per_second"] for found in measured.values()]
    bars = axes.barh(
        list(measured), speeds, color=["#2a6f97" if "lit-qlora" in name else "#a9b4c2" for name in measured]
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, padding not counted")
    axes.set_title(report["machine"] + (", under a T4's limits" if report["settings"]["t4"] else ""))
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    figure.text(0.01, 0.01, f"{report['command']}\n{versions}", fontsize=5, color="#666666")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
