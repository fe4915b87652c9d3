"""Makes a base of random weights in the shape of a Llama, for measuring: speed and memory don't ask what it knows.

    python benchmarks/random_base.py --shape 7b --output DIR [--tokenizer DIR]

Written tensor by tensor, in 16 bits, as safetensors of one decoder layer a file.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    # hidden, layers, heads, heads of keys and values, inner
    "small": (512, 8, 8, 8, 1376),
    "smollm2": (576, 30, 9, 3, 1536),
    "1b": (2048, 16, 16, 16, 5504),
    "tinyllama": (2048, 22, 32, 4, 5632),
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
}
VOCABULARY = 32_000


def make(shape: str, output: Path, tokenizer: Path | None = None, layers: int | None = None) -> Path:
    """Writes the base into ``output``, with the files of ``tokenizer`` beside it; returns ``output``."""
    hidden, num_layers, heads, key_heads, inner = SHAPES[shape]
    num_layers = layers or num_layers
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

    square, keys = (hidden, hidden), (hidden // heads * key_heads, hidden)
    wide, narrow = (inner, hidden), (hidden, inner)
    for number in range(num_layers):
        at = f"model.layers.{number}"
        attention = {f"{at}.self_attn.{part}_proj.weight": keys if part in "kv" else square for part in "qkvo"}
        mlp = {
            f"{at}.mlp.gate_proj.weight": wide,
            f"{at}.mlp.up_proj.weight": wide,
            f"{at}.mlp.down_proj.weight": narrow,
        }
        norms = {f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,)}
        write(f"layer-{number:03d}.safetensors", attention | mlp | norms)
    write(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": (VOCABULARY, hidden),
            "lm_head.weight": (VOCABULARY, hidden),
            "model.norm.weight": (hidden,),
        },
    )
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
        "num_hidden_layers": num_layers,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": VOCABULARY,
    }
    (output / "config.json").write_text(json.dumps(config, indent=1))
    for file in tokenizer.iterdir() if tokenizer else ():
        shutil.copyfile(file, output / file.name)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="folder of a Llama 2 tokenizer, copied beside the weights")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    options = parser.parse_args()
    print(make(options.shape, options.output, options.tokenizer, options.layers))
