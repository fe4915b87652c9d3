"""Owns the replay of decoder layers on a GPU that is faster than its host.

A layer has some 140 kernels, forward and backward, and a host needs longer to start them one by one than a large GPU to
run them. So they are recorded once for each shape of a micro-batch (CUDA graphs), and then started in one go each way.
Rows are padded, as `padded` says, so that there are few shapes. Knows neither batches nor the loss.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_qlora.model.attention import find_places
from lit_qlora.model.decoder import Layer, run_layers

MOST = 64
"""Recordings that are kept, those used last; a new one takes about as long as three steps."""


def padded(rows: int, tokens: int) -> int:
    """The tokens of a row in the recording for ``rows`` of ``tokens``: a multiple of 32, or of 8 to 24 for many rows.

    So fewer than 256 are added to a micro-batch, or at most 7 to a row.
    """
    width = max(8, min(32, 256 // rows // 8 * 8))
    return -(-tokens // width) * width


class _Recording(NamedTuple):
    """Both ways through the layers for one shape, and where they read and write, ``[B, T, h]``."""

    forward: Any
    backward: Any
    hidden: Tensor
    out: Tensor
    """What forward gives; once that was read, the gradient that backward starts from."""


class Graphs:
    """Decoder layers in training, replayed. Gives what `decoder.run_layers` gives, in the same kernels.

    Gradients go into buffers of its own, which become the ``grad`` of the adapter's weights: none is made for each
    recording, and none copied. All recordings work in the same memory, beside torch's own: only one is ever under way.

    Args:
        layers: without dropout, whose masks a recording would repeat.
        kept_layers: as for `decoder.run_layers`.
        rotary: transformers' rotary embedding of the model.
    """

    def __init__(self, layers: Sequence[Layer], kept_layers: int, rotary: Any) -> None:
        assert not any(linear.dropout for layer in layers for linear in layer.linears)
        self.layers, self.kept_layers, self.rotary = layers, kept_layers, rotary
        self.weights = [weight for layer in layers for weight in layer.lora]
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        self.turn: object = None
        """Stands for the forward whose backward is next: their memory is the next one's."""
        self._pool = torch.cuda.graph_pool_handle() if self.weights[0].is_cuda else None
        self._recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self._states = [self.weights[0].new_empty(0)] * 2
        # What autograd goes back from. No weight: its node in a graph that still stands would tie a recording to the
        # stream outside.
        self._anchor = self.weights[0].new_zeros(()).requires_grad_()

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden states ``[B, T, h]`` behind the layers; of whole conversations, one a row."""
        rows, tokens = hidden.shape[:2]
        shape = rows, padded(rows, tokens)
        if shape not in self._recordings:
            with torch.autocast(hidden.device.type, enabled=False):  # as it is in a backward, which runs in here, too
                self._recordings[shape] = self._record(shape, hidden)
        self._recordings.move_to_end(shape)
        if len(self._recordings) > MOST:
            self._recordings.popitem(last=False)
        return _Replay.apply(hidden, self, self._recordings[shape], self._anchor)  # type: ignore[no-any-return, no-untyped-call]

    def _record(self, shape: tuple[int, int], like: Tensor) -> _Recording:
        self._warm_up(like.new_zeros(*shape, like.shape[-1]))
        size = shape[0] * shape[1] * like.shape[-1]
        if len(self._states[0]) < size:
            self._states = [like.new_empty(size) for _ in range(2)]
        hidden, out = (state[:size].view(*shape, -1) for state in self._states)
        hidden.zero_()
        ran: list[Tensor] = []

        def forward() -> None:
            ran[:] = [self._run(self.layers, hidden, self.kept_layers)]
            out.copy_(ran[0].detach())

        def backward() -> None:
            torch._foreach_add_(self.gradients, torch.autograd.grad(ran.pop(), self.weights, out))

        return _Recording(_record(forward, self._pool), _record(backward, self._pool), hidden, out)

    def _warm_up(self, hidden: Tensor) -> None:
        """One layer of a kind: what is compiled, or chosen by trying, at the first use of a shape can't be recorded."""
        kept = self.kept_layers // len(self.layers)
        for layer in {layer.buffers: layer for layer in reversed(self.layers) if layer.lora}.values():
            torch.autograd.grad(self._run([layer], hidden, kept), layer.lora, hidden)

    def _run(self, layers: Sequence[Layer], hidden: Tensor, kept_layers: int) -> Tensor:
        return run_layers(layers, hidden, find_places(self.rotary, hidden, ()), kept_layers)

    def take_gradients(self) -> None:
        """Makes the buffers the weights' gradients, with what was gathered in this optimizer step so far."""
        new = [buffer for weight, buffer in zip(self.weights, self.gradients, strict=True) if weight.grad is None]
        if new:
            torch._foreach_zero_(new)
        for weight, buffer in zip(self.weights, self.gradients, strict=True):
            if weight.grad is not None and weight.grad is not buffer:  # another way gathered it
                buffer.copy_(weight.grad)
            weight.grad = buffer


def _record(run: Callable[[], None], pool: Any) -> Any:
    """The kernels of ``run``, to be replayed."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the card meanwhile: the one that pins batches does.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph


class _Replay(torch.autograd.Function):
    """A recording's two ways, as autograd knows them. The gradients of weights are gathered beside it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, graphs: Graphs, recording: _Recording, anchor: Tensor) -> Tensor:
        ctx.graphs, ctx.recording, ctx.tokens, ctx.turn = graphs, recording, hidden.shape[1], object()
        graphs.turn = ctx.turn
        _fill(recording.hidden, hidden)
        recording.forward.replay()
        return recording.out[:, : ctx.tokens].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        assert ctx.graphs.turn is ctx.turn, "another micro-batch went forward before this one went back"
        ctx.graphs.turn = None
        _fill(ctx.recording.out, grad)
        ctx.graphs.take_gradients()
        ctx.recording.backward.replay()
        return None, None, None, None


def _fill(buffer: Tensor, rows: Tensor) -> None:
    """Puts ``rows`` into ``buffer``, which has more tokens: zeros behind them, where nothing of the last may stay."""
    buffer[:, : rows.shape[1]].copy_(rows)
    buffer[:, rows.shape[1] :].zero_()
