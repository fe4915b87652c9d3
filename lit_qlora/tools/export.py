"""Owns the verb export: a merged model as one GGUF file, and the Modelfile with training's prompt format for Ollama.

Finds and calls llama.cpp's own conversion script. Knows nothing of GGUF but its first four bytes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from shlex import quote
from typing import Literal

from lit_qlora.chosen import choose_adapter
from lit_qlora.errors import UserError
from lit_qlora.model.base import Base, find_base, weight_files
from lit_qlora.storage.files import output_path, parse_json, require_new, require_room, size
from lit_qlora.storage.foreign import read_object
from lit_qlora.storage.run import RECORD
from lit_qlora.text.formats import from_record
from lit_qlora.tools.merge import BYTES, OTHER_DISK, DType, merge_into

SCRIPT = "convert_hf_to_gguf.py"
GET_IT = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp, pip install gguf sentencepiece, and set "
    "LLAMA_CPP=llama.cpp"
)
BYTES_PER_WEIGHT = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.0625}
MERGED_IN: dict[str, DType] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float16"}


def export(
    output: str,
    to: Literal["gguf"] = "gguf",
    run: str | None = None,
    adapter: str | None = None,
    model: str | None = None,
    base: str | None = None,
    outtype: Literal["f16", "bf16", "f32", "q8_0"] = "f16",
) -> None:
    """Write a model as one file for llama.cpp and Ollama, with a Modelfile next to it.

    Args:
        output: the file to write; it must not exist.
        to: format of the file.
        run: run folder, whose best adapter is merged first; default: the run that was started last.
        adapter: an adapter folder instead of a run.
        model: a folder that merge made, instead of both.
        base: the base of the adapter; default: the one that run or folder names.
        outtype: type of the written weights, as named by llama.cpp.

    Raises:
        UserError: for options that don't go together, a model or a tokenizer that llama.cpp can't read, and a disk
            that is too small.
    """
    target = output_path(output)
    beside = target.with_suffix(".Modelfile")
    for path in (target, beside):
        require_new(path)
    if model and (run or adapter or base):
        raise UserError(
            "it is merged already, so --run, --adapter and --base say nothing", option="model", remedy="give it alone"
        )
    chosen = None if model else choose_adapter(run, adapter, base)
    source = chosen.base if chosen else find_base(str(model))
    if not chosen:
        _check_convertible(source)
    _check_tokenizer(source)
    script, dtype = find_converter(), MERGED_IN[outtype]
    bytes_per_weight = BYTES_PER_WEIGHT[outtype] + (BYTES[dtype] if chosen else 0)
    needed_bytes = int(source.shape.num_parameters * bytes_per_weight)
    require_room(target, needed_bytes, str(target), option="output", remedy=OTHER_DISK)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        folder = Path(model or f"{scratch}/.merged")
        if chosen:
            merge_into(folder, chosen, dtype, "quantized")
        unfinished = Path(scratch) / target.name
        _convert(script, folder, unfinished, outtype)
        require_new(target)  # another process may have written it meanwhile
        unfinished.rename(target)
        print(f"export {target}: {size(target.stat().st_size)} of {outtype}")
        _write_modelfile(folder, target, beside)


def find_converter() -> Path:
    """Find llama.cpp's script: in the folder LLAMA_CPP, that file itself, or on the PATH.

    Raises:
        UserError: with how to get it.
    """
    named = os.environ.get("LLAMA_CPP")
    if named:
        path = Path(named).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no {SCRIPT} in {named}", option="LLAMA_CPP", remedy="it is to name llama.cpp's folder")
        return path
    found = shutil.which(SCRIPT)
    if found is None:
        raise UserError(f"export: llama.cpp's {SCRIPT} is not here", remedy=GET_IT)
    return Path(found)


def _check_tokenizer(base: Base) -> None:
    """Raises UserError unless ``base`` has a tokenizer that llama.cpp reads: a tokenizer.model, or a byte-level one.

    Without a tokenizer.model, it ignores the order of merges. Of a byte-level tokenizer.json it takes that order, and
    how texts are split from a table of known tokenizers: it stops at one that is not among them.
    """
    from lit_qlora.data.tokenizer import file_of, is_byte_level

    model, rules = (file_of(base.location, name) for name in ("tokenizer.model", "tokenizer.json"))
    if model is None and not (rules and is_byte_level(parse_json(rules.read_text(encoding="utf-8")))):
        raise UserError(
            f"export: {base.name} has no tokenizer.model, and without it llama.cpp would split text "
            "into other tokens than training did",
            remedy="take a base that has one",
        )


def _check_convertible(base: Base) -> None:
    """Raises UserError for a merged model that the converter can't read, or would read in another way."""
    if base.in_4_bits:
        problem = f"{base.name} is in 4 bits, which llama.cpp can't convert"
        raise UserError(problem, option="model", remedy="give one that is not, such as merge writes")
    folder = Path(base.location)
    others = {file.name for file in folder.glob("model*.safetensors")} - {file.name for file in weight_files(base)}
    if others:
        raise UserError(
            f"{base.name} has weights that are not those of its model, and llama.cpp would read "
            f"them too: move {min(others)} away",
            option="model",
        )
    for name in ("config.json", "tokenizer_config.json"):
        try:
            has_code = (folder / name).is_file() and "auto_map" in read_object(folder / name, base.name)
        except UserError as error:
            raise error.within("model") from error
        if has_code:
            raise UserError(f"{base.name} comes with code of its own: take auto_map out of its {name}", option="model")


def _convert(script: Path, model: Path, target: Path, outtype: str) -> None:
    """Run the script, in this Python, into the new file ``target``."""
    command = [sys.executable, str(script), str(model), "--outfile", str(target), "--outtype", outtype]
    command += ["--model-name", target.stem]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no error message").splitlines()[-1]
        raise UserError(f"export: {script.name} ended with status {done.returncode}: {last}")
    if not _is_gguf(target):
        raise UserError(f"export: {script.name} wrote no GGUF file")


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _write_modelfile(model: Path, target: Path, beside: Path) -> None:
    """Write the Modelfile of a merged model, whose prompt format is recorded."""
    from lit_qlora.data.encode import Encoder
    from lit_qlora.data.tokenizer import load_tokenizer

    record = model / RECORD
    if not record.is_file():
        print(f"no Modelfile: {model} does not record the prompt format it was trained with (it has no {RECORD})")
        return
    try:
        encoder = Encoder(load_tokenizer(str(model)), 1, prompt_format=from_record(read_object(record), model, RECORD))
        stops = encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids)
        # As llama.cpp's script reads it.
        adds_bos = read_object(model / "tokenizer_config.json").get("add_bos_token", True)
        beside.write_text(encoder.prompt_format.modelfile(target, stops, adds_bos), encoding="utf-8")
    except (ValueError, UserError) as error:
        print(f"no Modelfile: {error}")
        return
    name = quote(target.stem)
    print(f"try it: ollama create {name} -f {quote(str(beside))} && ollama run {name}")
