"""Owns the 4-bit layers of a base that no device holds whole: their bytes in shares, and the two that are whole.

A layer's packed weights and scales are one run of bytes, of which each process keeps a share, on its card or on the
host. Before a layer computes, forward or backward, its bytes are brought together in one of two buffers, and those of
the next layer begin to come into the other. Bytes are moved and nothing is computed, so that any precision learns the
same. The weights view into the buffers; nothing else of them exists. Knows no model and no file.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from lit_qlora.devices.world import from_first, is_first, peers, world
from lit_qlora.model.offload import locked, unlock_with
from lit_qlora.storage.files import size

ALIGNED = 256
"""Each tensor starts at a multiple of so many bytes, as with torch's own allocator: kernels read several at once."""


class TensorPart(NamedTuple):
    """A tensor of a layer, of which some bytes can be had.

    Args:
        dtype: of its values.
        shape: of the whole tensor.
        read: function that returns bytes as uint8, from the number of the first and how many.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Packed(NamedTuple):
    """A 4-bit weight whose bytes are shared: bitsandbytes' ``state``, in which `Shards` puts the scales, and its
    ``parts`` in order: values, scales and, with double quantisation, the scales of these."""

    state: Any
    parts: tuple[TensorPart, ...]


class Shards:
    """The layers of one model. Add them with `add`, in order, then `attach` once.

    Args:
        device: where they are whole, two at a time.
        on_host: True to keep this process's shares in the host's memory, page-locked; with one process that is all.
    """

    def __init__(self, device: torch.device, on_host: bool) -> None:
        here = world()
        assert on_host or here.size > 1, "one device has nothing to share with: `check_shard`"
        self.device, self.on_host, self.rank, self.size = device, on_host, here.rank, here.size
        self.lowest = 0
        """The lowest layer that is part of a backward: below, nothing is trained."""
        self._own: list[Tensor] = []
        self._weights: list[list[tuple[nn.Module, Packed]]] = []
        self._buffers: list[Tensor] = []
        self._holds: list[int | None] = [None, None]
        self._coming: list[Callable[[], Any] | None] = [None, None]
        self._passes: Counter[int] = Counter()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and on_host else None
        if on_host:
            unlock_with(self, self._own)

    # Making

    def add(self, weights: Sequence[tuple[nn.Module, Packed]]) -> None:
        """Keep this process's share of a layer.

        Args:
            weights: the linear modules of the layer, and what each is to have.
        """
        parts = [part for _, packed in weights for part in packed.parts]
        total = sum(_aligned(part.num_bytes) for part in parts)
        share = _aligned(-(-total // self.size))
        own = self._kept(share)
        self._own.append(own)
        start = self.rank * share
        for place, part in zip(_starts(parts), parts, strict=True):
            first, last = max(place, start), min(place + part.num_bytes, start + share)
            if first < last:
                own[first - start : last - start].copy_(part.read(first - place, last - first))
        # Of what was read, only this process's share stays.
        self._weights.append(
            [
                (module, Packed(packed.state, tuple(part._replace(read=_gone) for part in packed.parts)))
                for module, packed in weights
            ]
        )

    def attach(self) -> None:
        """Make the modules' weights views into the buffers, for good: layers of even numbers have the first."""
        whole = max(map(len, self._own)) * self.size
        self._buffers = [torch.zeros(whole, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._view()

    def _kept(self, num_bytes: int) -> Tensor:
        if self.on_host:
            return locked(num_bytes, torch.empty(0, dtype=torch.uint8, device=self.device)).zero_()
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

    def _view(self, is_empty: bool = False) -> None:
        for index, weights in enumerate(self._weights):
            parts = [part for _, packed in weights for part in packed.parts]
            buffer = self._buffers[index % 2]
            views = (
                torch.empty(0, dtype=part.dtype, device=self.device)
                if is_empty
                else buffer[place : place + part.num_bytes].view(part.dtype).view(part.shape)
                for place, part in zip(_starts(parts), parts, strict=True)
            )
            for module, packed in weights:
                module.weight.data, packed.state.absmax = next(views), next(views)  # type: ignore[union-attr, assignment]
                if len(packed.parts) > 2:
                    packed.state.state2.absmax = next(views)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which moving the model to another device leaves its 4-bit weights where they are."""
        self._view(is_empty=True)
        try:
            yield
        finally:
            self._view()

    # Using

    def __len__(self) -> int:
        return len(self._own)

    @property
    def own_bytes(self) -> int:
        """Bytes of this process's shares."""
        return sum(map(len, self._own))

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest whole layer, as of each of the two buffers."""
        return len(self._buffers[0])

    def describe(self) -> str:
        """The places of the layers, in words."""
        where = "in the host's memory" if self.on_host else "on its card"
        of = f"each of {self.size} processes keeps {size(self.own_bytes)}" if self.size > 1 else size(self.own_bytes)
        return f"the base's layers are shared: {of} {where}, and two at a time are whole ({size(2 * self.layer_bytes)})"

    def open(self, index: int, ahead: int) -> None:
        """Have the weights of a layer whole, until the next but one is opened; the next one begins to come.

        Args:
            index: of the layer.
            ahead: 1 in a forward, -1 in a backward.
        """
        self._fetch(index)
        self._settle(index % 2)
        if 0 <= index + ahead < len(self):
            self._fetch(index + ahead)

    def _fetch(self, index: int) -> None:
        slot, own = index % 2, self._own[index]
        if self._holds[slot] == index:
            return
        self._settle(slot)
        self._holds[slot] = None  # until the new bytes are on their way
        whole = self._buffers[slot][: len(own) * self.size]
        waits: Callable[[], Any] | None = None
        if self._stream:  # behind all that has read the buffer
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self.on_host:
                part = whole.narrow(0, self.rank * len(own), len(own))
                own = part.copy_(own, non_blocking=True)
            if self.size > 1:
                with peers():
                    waits = _gather(whole, own).wait
            elif self._stream:
                waits = partial(self._wait, self._stream.record_event())
        self._holds[slot], self._coming[slot] = index, waits

    def _wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def _settle(self, slot: int) -> None:
        """Let the computation wait for what comes into a buffer."""
        waits, self._coming[slot] = self._coming[slot], None
        if waits:
            with peers():
                waits()

    # In step with the other processes

    def count(self, process: int) -> None:
        """Note that ``process`` computes a micro-batch; -1: each of them does."""
        if process >= 0:
            self._passes[process] += 1

    def keep_pace(self, backward: bool) -> None:
        """Take part in the fetching of processes that have computed more micro-batches than this one since the last
        call. Each process calls it at the same point.

        Args:
            backward: True if they went backward, too.
        """
        most = max(self._passes.values(), default=0)
        for _ in range(most - self._passes[self.rank]):
            self.pass_through(backward)
        self._passes.clear()

    @contextmanager
    def by_first_alone(self, decoder: nn.Module) -> Iterator[bool]:
        """A context for what the first process alone computes with ``decoder``; yields True there.

        The others take part in fetching its layers until that is done.
        """
        if not is_first():
            while from_first(False):
                self.pass_through(backward=False)
            yield False
            return
        announced = decoder.register_forward_pre_hook(lambda *_: from_first(True) and None)
        try:
            yield True
        finally:
            announced.remove()
            from_first(False)

    def pass_through(self, backward: bool) -> None:
        """Open the layers as a micro-batch does, forward and if ``backward`` back, too, and compute nothing."""
        for index in range(len(self)):
            self.open(index, 1)
        for index in reversed(range(self.lowest, len(self))) if backward else ():
            self.open(index, -1)


def _gather(whole: Tensor, own: Tensor) -> Any:
    """Bring the shares of all processes together, and return at once; ``own`` may be a part of ``whole``."""
    gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    return gather(whole, own, async_op=True)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNED) * ALIGNED


def _starts(parts: Sequence[TensorPart]) -> Iterator[int]:
    """Where each of ``parts`` starts, in bytes."""
    place = 0
    for part in parts:
        yield place
        place += _aligned(part.num_bytes)


def _gone(first: int, count: int) -> Tensor:
    raise AssertionError("a weight is read once")
