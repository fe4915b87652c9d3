"""Owns what a fit takes of the host by formula: memory, and its folder. Needs no package, for `doctor` runs without."""

from lit_qlora.model.shape import Shape
from lit_qlora.storage.files import GIB

LIBRARIES = 2 * GIB
"""Python, torch with CUDA and the rest on the host: 0.5 GiB was measured without CUDA; the rest is an estimate."""


def loading_bytes(shape: Shape) -> int:
    """Host memory in bytes while a base is loaded: the libraries, and one weight at a time, in 16 bits.

    Args:
        shape: the base's.
    """
    return LIBRARIES + 2 * max(shape.vocabulary * shape.hidden, *(i * o for i, o in shape.linears.values()))


def run_folder_bytes(num_trained: int, keep_checkpoints: int, states: int) -> int:
    """Largest size of a run folder in bytes, without its figures.

    Args:
        num_trained: weights of the adapter, which are kept in fp32.
        keep_checkpoints: checkpoints that stay; each has the adapter, and the optimizer's state.
        states: values of that per weight, counted as fp32: small tensors have it so under 8 bits, too.

    Returns:
        Bytes of the best adapter, its copy, one being written, and the checkpoints with one more.
    """
    return (3 * 4 + (keep_checkpoints + 1) * 4 * (1 + states)) * num_trained
