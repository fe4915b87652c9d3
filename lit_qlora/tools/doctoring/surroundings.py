"""Owns the findings about this machine: packages, GPU, memory, disks, token. Each has its remedy.

Imports only the standard library and modules of ours that need no more, at the top: other packages may be broken.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_qlora.errors import one_line
from lit_qlora.forecast.host import loading_bytes
from lit_qlora.model import host
from lit_qlora.model.shape import LLAMA_2_SIZES, Shape
from lit_qlora.place import INSTALL, requirements
from lit_qlora.storage.files import GIB, existing_folder, free_bytes, size

MODULES = {
    # The submodule of each that fails first on a version conflict.
    "lightning": "lightning.pytorch",
    "transformers": "transformers.models.llama.modeling_llama",
}
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables of the environment that may hold the hub's token."""
WITHOUT_TORCH = ("jsonargparse", "datasets", "tensorboard")


class Finding(NamedTuple):
    """A finding about this machine.

    Args:
        kind: a problem stops a fit, a note does not.
        text: what was found, in one line.
        remedy: what to do about it; empty for nothing.
    """

    kind: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def reason(error: BaseException) -> str:
    """An ``error`` in one line."""
    words = one_line(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


# Packages


def packages() -> Iterator[Finding]:
    """Check that each needed package is there, within its range, and can be imported."""
    try:
        requirement: Any = importlib.import_module("packaging.requirements").Requirement
    except Exception:
        requirement = None
        yield Finding("problem", "packaging: can't be imported, no version is checked", "pip install packaging")
    for asked, name in zip(requirements(), _required(), strict=True):
        yield _package(name, asked, requirement, name in ("torch", *WITHOUT_TORCH) or _torch() is not None)


def _torch() -> Any:
    """torch, if it could be imported."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "cuda") else None


def _package(name: str, asked: str, requirement: Any, tries: bool) -> Finding:
    remedy = f"pip install '{asked}'"
    try:
        version = metadata.version(name)
        fits = requirement is None or requirement(asked).specifier.contains(version, prereleases=True)
    except metadata.PackageNotFoundError:
        return Finding("problem", f"{name}: not installed, expected {asked}", INSTALL)
    except Exception as error:  # half an installation has half a record
        return Finding("problem", f"{name}: no version can be read ({reason(error)})", f"{remedy} --force-reinstall")
    if not tries:
        return Finding("note", f"{name} {version}: not tried, for it needs torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(MODULES.get(name, name))
    except Exception as error:
        text = f"{name} {version}: can't be imported ({reason(error)})"
        return Finding("problem", text, f"{remedy} --force-reinstall; in a notebook, restart the session then")
    if not fits:
        return Finding("problem", f"{name} {version}: outside of {asked}", f"{remedy}; in a notebook, restart it then")
    return Finding("ok", f"{name} {version}")


def missing(error: BaseException | None) -> list[str]:
    """The missing packages that caused ``error``; empty for another cause."""
    while error is not None:
        if isinstance(error, ImportError):
            lacking = [name for name in _required() if not _is_there(MODULES.get(name, name))]
            if lacking and not error.name:  # a library's own check
                return lacking
            top = (error.name or "").partition(".")[0]
            # What a package stands on is known where it is installed: else, what is missing beside it shows.
            if top and not _is_there(top) and (lacking or _distribution(top) in _dependencies()):
                return lacking if _distribution(top) in lacking else [*lacking, top]
        error = error.__cause__ or error.__context__
    return []


def _required() -> list[str]:
    """The names of the packages that are needed."""
    return [re.split(r"[^\w-]", one)[0] for one in requirements()]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _distribution(module: str) -> str:
    """The package of ``module``, by its name."""
    names = {which.partition(".")[0]: name for name, which in MODULES.items()} | {"yaml": "pyyaml"}
    return re.sub(r"[-_.]+", "-", names.get(module, module)).lower()


def _dependencies() -> set[str]:
    """The packages that are needed and what they stand on, as far as they are installed."""
    found, ahead = set[str](), [_distribution(name) for name in _required()]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            ahead += [_distribution(re.split(r"[^\w.-]", one)[0]) for one in needs if "extra ==" not in one]
    return found


def torchao() -> Iterator[Finding]:
    """Run peft's own check of torchao, which raises for an old one."""
    if importlib.util.find_spec("torchao") is None:
        return
    try:
        from peft.import_utils import is_torchao_available
    except Exception:  # reported with peft already
        return
    try:
        is_torchao_available()
    except ImportError as error:
        yield Finding(
            "note",
            f"torchao: peft refuses every base that is not in 4 bits ({' '.join(str(error).split())}); fit, chat and "
            "merge here are not touched, PeftModel on 16-bit weights is",
            "pip uninstall -y torchao, or pip install -U torchao",
        )


# What is computed on


def gpu() -> Iterator[Finding]:
    """Compare the GPU that torch sees with the output of the driver's own program."""
    name, driver = _first_gpu()
    seen, torch = f"{name} driver {driver}" if name else "", _torch()
    if torch is None:
        yield Finding("note", f"GPU: {seen or 'none seen'}; torch can't be imported")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            yield _no_gpu(torch, seen)
            return
    from lit_qlora.model.device import OTHER_CARD, capability_words, lacks_kernels

    capability, (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
    text = (
        f"GPU: {torch.cuda.get_device_name()}, compute capability {capability_words(capability)}, "
        f"{f'driver {driver}, ' if name else ''}{total / GIB:.2f} GiB, {free / GIB:.2f} free"
    )
    if torch.cuda.device_count() > 1:
        text += f"; the first of {torch.cuda.device_count()}"
    if lack := lacks_kernels(capability):
        yield Finding("problem", f"{text}: it has {lack}", OTHER_CARD)
    elif free < 0.9 * total:
        yield Finding("note", f"{text}: another process holds the rest", "end it (nvidia-smi; a notebook's kernel?)")
    else:
        yield Finding("ok", text)
    yield from _several(torch)
    yield from compiler(capability)


def _several(torch: Any) -> Iterator[Finding]:
    """The GPUs of a machine that has several, and how they exchange gradients."""
    count = torch.cuda.device_count()
    if count == 1:
        return
    from lit_qlora.model.device import by_bf16, capability_words

    cards = [
        f"{torch.cuda.get_device_name(gpu)} ({capability_words(torch.cuda.get_device_capability(gpu))}, "
        f"{torch.cuda.get_device_properties(gpu).total_memory / GIB:.2f} GiB)"
        for gpu in range(count)
    ]
    pairs = list(combinations(range(count), 2))
    direct = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    how = "directly" if direct else "through the host"
    if 0 < direct < len(pairs):
        how += f" in {direct} of {len(pairs)} pairs, else through the host"
    links = _links(count)
    text = f"GPUs: {count}, which exchange gradients {how}{f' ({links})' if links else ''}"
    if len({*cards}) == 1:
        yield Finding("ok", f"{text}; --trainer.devices {count} trains on all")
    elif not all(by_bf16(range(count))):
        yield Finding("ok", f"{text}: {', '.join(cards)}; a step waits for the slowest of those in --trainer.devices")
    else:
        yield Finding(
            "note", f"{text}: {', '.join(cards)}; not all have bf16",
            "give --trainer.devices the numbers of one kind, or --trainer.precision 16-mixed",
        )  # fmt: skip


def _links(count: int) -> str:
    """The links between GPUs by the driver's own program: NV4 is NVLink, PHB, PIX and others PCIe; else empty."""
    try:
        shown = re.sub(r"\x1b\[\d*m", "", _nvidia_smi("topo", "-m"))
        rows = [words for words in map(str.split, shown.splitlines()) if words]
        table = [row[1 : count + 1] for row in rows if re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
        found = {table[one][other] for one, other in combinations(range(count), 2)}
    except Exception:
        return ""
    return f"links {', '.join(sorted(found))}" if all(re.fullmatch(r"[A-Z]+\d*", link) for link in found) else ""


def _no_gpu(torch: Any, seen: str) -> Finding:
    if not seen:
        return Finding(
            "note", "GPU: none; the demo trains without one, Llama 2 7B does not",
            "on Colab: Runtime, Change runtime type, T4",
        )  # fmt: skip
    if not torch.version.cuda:
        return Finding("problem", f"GPU: {seen}, and this torch is a build without CUDA", "install torch for CUDA")
    trouble = ""
    try:
        torch.cuda.init()
    except Exception as error:
        trouble = reason(error)
    return Finding("problem", f"GPU: {seen}, and torch can't use it ({trouble})", "update the driver, or restart")


def _first_gpu() -> tuple[str, str]:
    """Name and driver of the first GPU; both empty without one."""
    try:
        shown = _nvidia_smi("--query-gpu=name,driver_version", "--format=csv,noheader")
        name, driver = shown.splitlines()[0].rsplit(",", 1)
        return name.strip(), driver.strip()
    except Exception:
        return "", ""


def _nvidia_smi(*args: str) -> str:
    """The output of the driver's own program. Raises where there is none."""
    return subprocess.run(["nvidia-smi", *args], capture_output=True, text=True, timeout=20, check=True).stdout


def compiler(capability: tuple[int, int]) -> Iterator[Finding]:
    """Check for triton, a C compiler and Python's headers, for a GPU of compute ``capability``."""
    from lit_qlora.model.device import compiler_lacks

    if missing := compiler_lacks(capability):
        text = f"compiled kernels: {' and '.join(missing)} missing"
        yield Finding("note", text, "install gcc and python3-dev, or give --model.compile false")


def four_bit() -> Iterator[Finding]:
    """Quantise and dequantise one weight, on the device of a fit."""
    torch, functional = _torch(), sys.modules.get("bitsandbytes.functional")
    if torch is None or functional is None:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        weight = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        far = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
        if not far < 0.2:
            raise ArithmeticError(f"a weight comes back {far:.2g} off")
    except Exception as error:
        text = f"bitsandbytes: 4 bits fail on the {device} ({reason(error)})"
        yield Finding("problem", text, "python -m bitsandbytes shows more; pip install --force-reinstall bitsandbytes")
        return
    yield Finding("ok", f"bitsandbytes: 4 bits work on the {device}")


# Room


def host_memory() -> Iterator[Finding]:
    """Compare this machine's memory with what loading a base takes."""
    found = host.memory_bytes()
    if found is None:
        yield Finding("ok", "host memory: unavailable on this system")
        return
    total, free = found
    shown = f"host memory: {total / GIB:.1f} GiB, {free / GIB:.1f} available"
    if free < (needed := loading_bytes(Shape.of(LLAMA_2_SIZES["7b"]))):
        yield Finding("note", f"{shown}; loading a 7B takes {needed / GIB:.1f}", "end other programs")
    else:
        yield Finding("ok", shown)


def disk(what: str, folder: Path, needed: int, remedy: str) -> Iterator[Finding]:
    """Compare the free space of a disk with what a fit will write there.

    Args:
        what: what lies there, in words.
        folder: where; it may not exist yet.
        needed: bytes.
        remedy: what to do if it is too small.

    Yields:
        One finding: a problem if the folder is not writable or the disk is too small.
    """
    there = existing_folder(folder)
    free = free_bytes(there)
    shown = f"disk of {what}: {size(free)} free"
    if not os.access(there, os.W_OK):
        yield Finding("problem", f"{shown}, and it may not be written", remedy)
    elif free < needed:
        yield Finding("problem", f"{shown}, {size(needed)} needed", f"free some, or {remedy}")
    elif str(there.resolve()).startswith("/content/drive"):
        yield Finding("note", f"{shown}; a mounted Drive loses files", "write here, and give --mirror that folder")
    else:
        yield Finding("ok", shown)


def hub_cache() -> Path:
    """The hub library's download cache."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except Exception:
        return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    return Path(HF_HUB_CACHE)


# The hub


def token() -> Iterator[Finding]:
    """Report where the hub's token is, if there is one; never its value."""
    if any(os.environ.get(name, "").strip() for name in TOKEN_VARIABLES):
        yield Finding("ok", "token: in the environment")
        return
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    stored = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    try:
        is_stored = bool(stored.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        is_stored = False
    if is_stored:
        yield Finding("ok", "token: a stored one")
    else:
        yield Finding("ok", "token: none; open bases need none, gated ones do (HF_TOKEN in the environment)")
