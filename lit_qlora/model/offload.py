"""Owns activations that wait in the host's memory between a layer's forward and its backward.

A card without the room to keep every layer's results can send some to the host while later layers are computed, and
fetch them ahead of their backward: the bus is idle otherwise, and no product is computed twice. Copies are exact. Knows
no layer; `decoder.run_together` decides what is sent.
"""

import mmap
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import finalize

import torch
from torch import Tensor

from lit_qlora.errors import UserError
from lit_qlora.storage import files

IN_TRANSIT = 2
"""Layers' tensors that are on the card while they come or go, at most."""

_locked: set[int] = set()
"""Addresses of the buffers that CUDA has page-locked."""


@dataclass(eq=False)
class Parked:
    """Tensors of one layer that wait on the host.

    Args:
        buffer: one-dimensional, holds them one behind the other.
        shapes: of the tensors, in order.
        below: the tensors of the layer whose backward is next, to be fetched ahead; None for the lowest layer.
        copied: event behind the last copy, in either direction; None on a CPU.
        on_card: the tensors on the card, while they leave it or come back.
    """

    buffer: Tensor
    shapes: Sequence[torch.Size]
    below: "Parked | None"
    copied: torch.cuda.Event | None = None
    on_card: list[Tensor] = field(default_factory=list)


class HostStore:
    """Sends tensors to the host and fetches them back, beside the computation; one micro-batch at a time.

    A buffer per layer is made at its first use and used again. On a GPU buffers are page-locked, so that copies run
    beside kernels, on a stream of their own; on a CPU a copy is a copy.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._num_parked = 0
        self._last: Parked | None = None
        self._leaving: deque[Parked] = deque()
        self._stream: torch.cuda.Stream | None = None
        unlock_with(self, self._buffers)

    def begin(self) -> None:
        """Start a micro-batch's forward: what earlier ones parked is no longer needed."""
        self._leaving.clear()
        self._num_parked, self._last = 0, None

    def put(self, tensors: Sequence[Tensor]) -> Parked:
        """Send the ``tensors`` of a layer, all of one dtype. They leave the card when `settle` lets them go."""
        parked = Parked(self._buffer(tensors), [tensor.shape for tensor in tensors], self._last)
        self._last = parked
        parts = parked.buffer[: sum(tensor.numel() for tensor in tensors)].split([one.numel() for one in tensors])
        parked.copied = self._copy(parts, [tensor.flatten() for tensor in tensors])
        parked.on_card = list(tensors)
        self._leaving.append(parked)
        return parked

    def settle(self, most: int = 0) -> None:
        """Let all but the last ``most`` that were sent leave the card."""
        while len(self._leaving) > most:
            parked = self._leaving.popleft()
            # The computation waits for the copy, and so may reuse the memory whatever its host is ahead by.
            self._wait(parked)
            parked.on_card = []

    def take(self, parked: Parked) -> list[Tensor]:
        """Fetch a layer's tensors, which `put` returned as ``parked``; the next ones below begin to come."""
        self._fetch(parked)
        if parked.below:
            self._fetch(parked.below)
        self._wait(parked)
        tensors, parked.on_card = parked.on_card, []
        return tensors

    def close(self) -> None:
        """Give the buffers back to the host."""
        self.begin()
        unlock(*self._buffers)
        self._buffers.clear()

    def _buffer(self, tensors: Sequence[Tensor]) -> Tensor:
        like, size = tensors[0], sum(tensor.numel() for tensor in tensors)
        at, self._num_parked = self._num_parked, self._num_parked + 1
        if at == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=like.dtype))
        buffer = self._buffers[at]
        if len(buffer) < size or buffer.dtype != like.dtype:
            unlock(buffer)
            self._buffers[at] = buffer = locked(size, like)
        return buffer

    def _fetch(self, parked: Parked) -> None:
        if parked.on_card:
            return
        sizes = [shape.numel() for shape in parked.shapes]
        device = self._stream.device if self._stream else "cpu"
        parked.on_card = [parked.buffer.new_empty(shape, device=device) for shape in parked.shapes]
        parts = parked.buffer[: sum(sizes)].split(sizes)
        parked.copied = self._copy([tensor.view(-1) for tensor in parked.on_card], parts)

    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> torch.cuda.Event | None:
        on_card = next((one for one in (*targets, *sources) if one.is_cuda), None)
        if on_card is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return None
        self._stream = self._stream or torch.cuda.Stream(on_card.device)
        self._stream.wait_stream(torch.cuda.current_stream(on_card.device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _wait(self, parked: Parked) -> None:
        if parked.copied:
            torch.cuda.current_stream().wait_event(parked.copied)


def copy_gb_per_s(size: int = 2**26) -> float:
    """The slower rate of copies of ``size`` bytes between this GPU and page-locked memory of its host, in GB/s.

    Raises UserError if no memory can be locked.
    """
    on_card = torch.empty(size, dtype=torch.uint8, device="cuda")
    buffer = locked(size, on_card)
    slowest = 0.0
    try:
        for target, source in ((buffer, on_card), (on_card, buffer)):
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            started = time.monotonic()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            slowest = max(slowest, time.monotonic() - started)
    finally:
        unlock(buffer)
    return size / slowest / 1e9


def locked(size: int, like: Tensor) -> Tensor:
    """A buffer on the host, page-locked where ``like`` is on a GPU. Give it to `unlock` before it is freed.

    Not by ``pin_memory=True``, which takes up to twice as much: it rounds up to a power of two.

    Args:
        size: number of elements.
        like: tensor of their dtype, on the device that copies go to.

    Raises:
        UserError: there is no such memory, or CUDA can't lock it.
    """
    buffer = _on_own_pages(size, like.dtype)
    if like.is_cuda:
        whole, cudart = buffer.untyped_storage(), torch.cuda.cudart()
        status = cudart.cudaHostRegister(whole.data_ptr(), whole.nbytes(), 0)
        if status != cudart.cudaError.success:
            with suppress(RuntimeError):  # takes note of CUDA's last error, else that of the next kernel
                torch.zeros(1, device=like.device)
            raise _no_room(whole.nbytes(), f"page-locked: CUDA says {cudart.cudaGetErrorString(status)!r}")
        _locked.add(whole.data_ptr())
    return buffer


def _on_own_pages(size: int, dtype: torch.dtype) -> Tensor:
    """An empty buffer of whole pages of memory of its own. Raises UserError where there is none.

    CUDA locks whole pages: the heap's may hold what another buffer locks, and what the heap does with them later is
    not ours to say. Shared pages, besides, stay the same ones when this process forks.
    """
    num_bytes = max(size * dtype.itemsize, 1)
    try:
        pages = mmap.mmap(-1, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    except OSError as error:
        raise _no_room(num_bytes, f"had: {error.strerror}") from error
    return torch.frombuffer(pages, dtype=torch.uint8)[: size * dtype.itemsize].view(dtype)


def unlock(*buffers: Tensor) -> None:
    """Make page-locked buffers of the host ordinary ones, before they are freed.

    Whatever is mapped where a buffer was freed that CUDA still has for locked is copied to the card from the pages of
    then: a base loaded next had other scales in some layers, without an error. So what is locked is known here:
    ``Tensor.is_pinned`` asks about the storage's first byte, and is False for a buffer that begins behind it.
    """
    for address in (buffer.untyped_storage().data_ptr() for buffer in buffers):
        if address in _locked:
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
            _locked.remove(address)


def unlock_with(owner: object, buffers: list[Tensor]) -> None:
    """Unlock buffers when their owner is gone: CUDA would take what comes to lie there for locked.

    Args:
        owner: any object that weak references can be made to.
        buffers: of `locked`; what the list holds by then.
    """
    finalize(owner, lambda: unlock(*buffers)).atexit = False


def _no_room(num_bytes: int, why: str) -> UserError:
    return UserError(
        f"{files.size(num_bytes)} of this machine's memory can't be {why}",
        remedy="give --model.offload false, and --model.shard_to gpu with a base in shares, or end other programs",
    )
