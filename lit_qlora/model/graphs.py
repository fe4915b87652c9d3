"""Owns CUDA graphs of the decoder layers, for a GPU that is faster than its host.

A layer has some 140 kernels, forward and backward, and a host needs longer to start them one by one than a large GPU to
run them. So they are recorded once per shape of a micro-batch, and then started together, once per direction. Rows are
padded by `padded`, so that there are few shapes. Knows neither batches nor the loss.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_qlora.model.attention import find_places
from lit_qlora.model.decoder import Layer, MicroBatch, draw_seeds, run_together

MOST = 64
"""Number of recordings kept, the most recently used; a new one takes about as long as three steps."""

RECORDING_COST = 7.0
"""What a recording takes, in replays: three steps started kernel by kernel, of which a layer's take 9.7 ms and 4.1 ms
replayed (H100, 4 x 460 tokens)."""


def padded(rows: int, tokens: int) -> int:
    """Tokens per row of the recording that computes a micro-batch: a multiple of 32, or of 8 to 24 for many rows.

    Padding adds fewer than 256 tokens per micro-batch, or at most 7 per row.

    Args:
        rows: of the micro-batch.
        tokens: of its longest row.
    """
    width = max(8, min(32, 256 // rows // 8 * 8))
    return -(-tokens // width) * width


class _Recording(NamedTuple):
    """Recorded forward and backward of the layers for one shape, with their buffers, ``[B, T, h]``."""

    forward: Any
    backward: Any
    hidden: Tensor
    out: Tensor
    """The output of forward; once that was read, the gradient for backward."""


class Graphs:
    """Decoder layers in training, replayed from recordings: the results of `decoder.run_together`, where cuDNN computes
    attention up to its rounding.

    Gradients go into its own buffers, which become the ``grad`` of the adapter's weights: there is one set for all
    recordings, and no copy. All recordings share one memory pool, beside torch's own: only one runs at a time.

    Args:
        layers: without dropout, whose masks a recording would repeat.
        kept_layers: as for `decoder.run_together`.
        rotary: transformers' rotary embedding of the model.
        uses: how many micro-batches of the run have each padded shape, as far as that is known.
    """

    def __init__(
        self, layers: Sequence[Layer], kept_layers: int, rotary: Any, uses: Mapping[tuple[int, int], float] = {}
    ) -> None:
        assert not any(linear.dropout for layer in layers for linear in layer.linears)
        self.layers, self.kept_layers, self.rotary, self.uses = layers, kept_layers, rotary, uses
        self.weights = [weight for layer in layers for weight in layer.lora]
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        self.turn: object = None
        """Identifies the forward whose backward is next: the next forward reuses their memory."""
        self._pool = torch.cuda.graph_pool_handle() if self.weights[0].is_cuda else None
        self._recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self._lost: Counter[tuple[int, int]] = Counter()
        """Time lost to padding, in replays, by each shape that has no recording yet."""
        self._states = [self.weights[0].new_empty(0)] * 2
        # The leaf of the graph. Not a weight: its node in a graph that still exists would tie a recording to the outer
        # stream.
        self._anchor = self.weights[0].new_zeros(()).requires_grad_()

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden states ``[B, T, h]`` after the layers; of whole conversations, one per row."""
        recording = self.prepare((hidden.shape[0], hidden.shape[1]), hidden)
        return _Replay.apply(hidden, self, recording, self._anchor)  # type: ignore[no-any-return, no-untyped-call]

    def prepare(self, shape: tuple[int, int], like: Tensor) -> _Recording:
        """The recording that computes a micro-batch; recorded here if that pays.

        Which shapes are recorded, and when, follows from the shapes alone. So devices that see those of all record the
        same at the same time, and none waits while another does.

        Args:
            shape: rows of the micro-batch, and tokens per row.
            like: of the dtype and on the device of hidden states.
        """
        shape = self._paid((shape[0], padded(*shape)))
        if shape not in self._recordings:
            with torch.autocast(like.device.type, enabled=False):  # as it is in a backward, which runs in here, too
                self._recordings[shape] = self._record(shape, like)
        self._recordings.move_to_end(shape)
        if len(self._recordings) > MOST:
            self._recordings.popitem(last=False)
        return self._recordings[shape]

    def _paid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """``shape``; or a longer one that is recorded, if the padding of all ``uses`` costs less than a recording.

        If these are not known, until it has cost as much. So the two together never take more than twice the least,
        however often the shape is seen.
        """
        longer = [one for one in self._recordings if one[0] == shape[0] and one[1] >= shape[1]]
        nearest = min(longer, default=shape)
        padding = nearest[1] / shape[1] - 1
        self._lost[shape] += padding  # type: ignore[assignment]  # a Counter counts fractions, too
        cost = max(self._lost[shape], padding * self.uses.get(shape, 0))
        return nearest if cost < RECORDING_COST else shape

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
        """Run one layer per kind: what is compiled or autotuned at the first use of a shape can't be recorded."""
        kept = self.kept_layers // len(self.layers)
        for layer in {layer.buffers: layer for layer in reversed(self.layers) if layer.lora}.values():
            torch.autograd.grad(self._run([layer], hidden, kept), layer.lora, hidden)

    def _run(self, layers: Sequence[Layer], hidden: Tensor, kept_layers: int) -> Tensor:
        places = find_places(self.rotary, hidden, (), is_recurrent=True)
        return run_together(layers, [MicroBatch(hidden, places, draw_seeds(layers))], kept_layers)[0]

    def take_gradients(self) -> None:
        """Make the buffers the weights' gradients, with what was accumulated in this optimizer step so far."""
        new = [buffer for weight, buffer in zip(self.weights, self.gradients, strict=True) if weight.grad is None]
        if new:
            torch._foreach_zero_(new)
        for weight, buffer in zip(self.weights, self.gradients, strict=True):
            if weight.grad is not None and weight.grad is not buffer:  # accumulated without a recording
                buffer.copy_(weight.grad)
            weight.grad = buffer


def _record(run: Callable[[], None], pool: Any) -> Any:
    """The recorded kernels of ``run``."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the card meanwhile: the one that pins batches does.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph


class _Replay(torch.autograd.Function):
    """A recording's forward and backward as an autograd function; gradients of weights are accumulated beside it."""

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
        assert ctx.graphs.turn is ctx.turn, "another forward ran before this one's backward"
        ctx.graphs.turn = None
        _fill(ctx.recording.out, grad)
        ctx.graphs.take_gradients()
        ctx.recording.backward.replay()
        return None, None, None, None


def _fill(buffer: Tensor, rows: Tensor) -> None:
    """Copy ``rows`` into ``buffer``, which has more tokens, and zero the rest, which may hold earlier ones."""
    buffer[:, : rows.shape[1]].copy_(rows)
    buffer[:, rows.shape[1] :].zero_()
