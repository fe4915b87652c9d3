"""Owns the bytes of a run folder by formula. Needs no package, for `doctor` runs without any."""


def run_folder_bytes(num_trained: int, keep_checkpoints: int) -> int:
    """Largest size of a run folder in bytes, without its figures.

    Args:
        num_trained: weights of the adapter, which are kept in fp32.
        keep_checkpoints: checkpoints that stay; each has the adapter and two moments of each weight.

    Returns:
        Bytes of the best adapter, its copy, one being written, and the checkpoints with one more.
    """
    return (3 * 4 + (keep_checkpoints + 1) * 12) * num_trained
