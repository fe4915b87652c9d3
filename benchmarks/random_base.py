"""Make a base of random weights in the shape of a Llama, for measuring: speed and memory don't ask what it knows.

    python benchmarks/random_base.py --shape 7b --output DIR [--tokenizer DIR]
    python benchmarks/random_base.py --shape 70b --in-4-bits --output DIR    # 35 GB, in seconds

Written tensor by tensor, as safetensors of one decoder layer per file: in 16 bits, or already in 4.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from asked import above_0, existing, new, refuse_unused, whole
from safetensors.torch import save_file

SHAPES = {
    # hidden, layers, heads, heads of keys and values, inner
    "small": (512, 8, 8, 8, 1376),
    "smollm2": (576, 30, 9, 3, 1536),
    "1b": (2048, 16, 16, 16, 5504),
    "tinyllama": (2048, 22, 32, 4, 5632),
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
    "70b": (8192, 80, 64, 8, 28672),
}
VOCABULARY = 32_000
SCALE, SPREAD = 0.035, 2 / 7
"""Mean of the scales of a 4-bit weight's blocks, and their largest distance from it, as a share of it. At the
width of 1b a rounding grows a thousandfold on its way down such layers; not with half of it (docs/log.md)."""
STEP = 4096
"""Bytes between the random values of one weight in 4 bits and those of the next."""


def make(shape: str, output: Path, tokenizer: Path | None = None, layers: int | None = None) -> Path:
    """Write a base of random weights in 16 bits.

    Args:
        shape: Its shape, a name in ``SHAPES``.
        output: Folder to make.
        tokenizer: Folder of the tokenizer files to copy; None for none.
        layers: Number of decoder layers; None for the shape's own.

    Returns:
        ``output``.
    """
    output.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}

    def write(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for key, size in shapes.items():
            weight = torch.empty(size, device=device, dtype=torch.float16)
            tensors[key] = (weight.fill_(1) if len(size) == 1 else weight.normal_(0, 0.02, generator=generator)).cpu()
        save_file(tensors, output / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shapes, name))

    for file, sizes in tensors(shape, layers):
        write(file, sizes)
    write_rest(output, shape, layers, index, tokenizer, {})
    return output


def tensors(shape: str, layers: int | None) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Names and sizes of a base's tensors.

    Args:
        shape: Shape of the base, a name in ``SHAPES``.
        layers: Number of decoder layers; None for the shape's own.

    Returns:
        For each file its name, and its tensors' sizes by name.
    """
    hidden, num_layers, heads, key_heads, inner = SHAPES[shape]
    square, keys = (hidden, hidden), (hidden // heads * key_heads, hidden)
    wide, narrow = (inner, hidden), (hidden, inner)
    for number in range(layers or num_layers):
        at = f"model.layers.{number}"
        attention = {f"{at}.self_attn.{part}_proj.weight": keys if part in "kv" else square for part in "qkvo"}
        mlp = {
            f"{at}.mlp.gate_proj.weight": wide,
            f"{at}.mlp.up_proj.weight": wide,
            f"{at}.mlp.down_proj.weight": narrow,
        }
        norms: dict[str, tuple[int, ...]] = {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
        yield f"layer-{number:03d}.safetensors", attention | mlp | norms
    yield (
        "ends.safetensors",
        {
            "model.embed_tokens.weight": (VOCABULARY, hidden),
            "lm_head.weight": (VOCABULARY, hidden),
            "model.norm.weight": (hidden,),
        },
    )


def make_in_4_bits(
    shape: str,
    output: Path,
    tokenizer: Path | None = None,
    layers: int | None = None,
    dtype: str = "bfloat16",
    scale: float = SCALE,
) -> Path:
    """Write a base in NF4 of random bytes, in no more time than writing takes: nothing is quantised.

    The values come from one random run of bytes, in which each weight begins at a place of its own.

    Args:
        shape: Its shape, a name in ``SHAPES``.
        output: Folder to make.
        tokenizer: Folder of the tokenizer files to copy; None for none.
        layers: Number of decoder layers; None for the shape's own.
        dtype: Dtype to compute in, and of the weights that are not in 4 bits, by torch's name.
        scale: Mean of the scales of a weight's blocks.

    Returns:
        ``output``.
    """
    from bitsandbytes.functional import quantize_4bit

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from lit_qlora.model.load import nf4

    output.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    most = (
        max(shape[0] * shape[1] for _, sizes in tensors(shape, 1) for shape in sizes.values() if len(shape) == 2) // 2
    )
    run = torch.empty(most + STEP * 2048, dtype=torch.uint8).random_(generator=generator)
    as_written = getattr(torch, dtype)
    _, state = quantize_4bit(torch.randn(64, 64).to(as_written), compress_statistics=True, quant_type="nf4")
    state.offset = torch.tensor(scale)
    index: dict[str, str] = {}
    jobs = []
    for at, (file, sizes) in enumerate(tensors(shape, layers)):
        parts: dict[str, Any] = {}
        for number, (name, size) in enumerate(sizes.items()):
            start = (at * 7 + number) % 2048 * STEP
            if len(size) == 2 and ".layers." in name:
                parts |= packed(name, size, state, run[start:], scale * SPREAD)
            elif len(size) == 2:
                parts[name] = torch.empty(size, dtype=as_written).normal_(0, 0.02, generator=generator)
            else:
                parts[name] = torch.ones(size, dtype=as_written)
        index.update(dict.fromkeys(parts, file))
        jobs.append(partial(write_file, output / file, parts))
    with ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    own = {"quantization_config": nf4(as_written).to_dict(), "torch_dtype": dtype}
    write_rest(output, shape, layers, index, tokenizer, own)
    return output


def packed(name: str, size: tuple[int, ...], state: Any, run: torch.Tensor, spread: float) -> dict[str, torch.Tensor]:
    """A 4-bit weight and what bitsandbytes stores beside it.

    Args:
        name: Name of the weight.
        size: Its size, (outputs, inputs).
        state: bitsandbytes' state of another such weight, whose size is changed to this one.
        run: Random bytes (uint8), from which values and scales are taken.
        spread: Largest distance of a block's scale from the mean.

    Returns:
        The tensors to store, by name.
    """
    values = size[0] * size[1]
    state.shape = torch.Size(size)
    beside = state.as_dict(packed=True)
    beside["absmax"] = run[: -(-values // state.blocksize)]
    beside["nested_absmax"] = torch.full((-(-len(beside["absmax"]) // state.state2.blocksize),), spread)
    return {name: run[: values // 2].view(-1, 1)} | {f"{name}.{key}": value for key, value in beside.items()}


DTYPES = {"uint8": "U8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def write_file(file: Path, parts: dict[str, torch.Tensor]) -> None:
    """Write ``parts``, tensors by name, to ``file`` as safetensors, without copying any.

    safetensors' own function refuses tensors that share their memory.
    """
    entries, place = {}, 0
    for name, value in parts.items():
        kind = DTYPES[str(value.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": kind, "shape": [*value.shape], "data_offsets": [place, place + value.nbytes]}
        place += value.nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for value in parts.values():
            stream.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_rest(
    output: Path, shape: str, layers: int | None, index: dict[str, str], tokenizer: Path | None, own: dict[str, Any]
) -> None:
    """Write all files of a base but its weights.

    Args:
        output: Folder of the base.
        shape: Its shape, a name in ``SHAPES``.
        layers: Number of decoder layers; None for the shape's own.
        index: File of each tensor, by the tensor's name.
        tokenizer: Folder of the tokenizer files to copy; None for none.
        own: Keys of config.json beside the shape's.
    """
    hidden, num_layers, heads, key_heads, inner = SHAPES[shape]
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        "num_attention_heads": heads,
        "num_hidden_layers": layers or num_layers,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": VOCABULARY,
    }
    (output / "config.json").write_text(json.dumps(config | own, indent=1))
    for file in tokenizer.iterdir() if tokenizer else ():
        shutil.copyfile(file, output / file.name)


def main() -> None:
    """Make a base, and print where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--output", type=new, required=True)
    parser.add_argument("--tokenizer", type=existing, help="folder of a Llama 2 tokenizer, copied beside the weights")
    parser.add_argument("--layers", type=whole, help="fewer layers than the shape has")
    parser.add_argument("--in-4-bits", action="store_true", help="already quantised")
    dtypes = [name for name in DTYPES if "float" in name]
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="that a base in 4 bits computes in")
    parser.add_argument("--scale", type=above_0, default=SCALE, help="of the weights of a base in 4 bits")
    options = parser.parse_args()
    if not options.in_4_bits:
        refuse_unused(parser, options, "a base in 16 bits", ["dtype", "scale"])
    write = partial(make_in_4_bits, dtype=options.dtype, scale=options.scale) if options.in_4_bits else make
    print(write(options.shape, options.output, options.tokenizer, options.layers))


if __name__ == "__main__":
    main()
