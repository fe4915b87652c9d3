"""Owns the bytes of a training step by formula: memory at each of its moments, part by part.

The coefficients are counted, not fitted: `tests/forecast/test_memory.py` measures them on a small model with torch's
own allocator. Knows no card and no data; sizes and settings go in, bytes come out.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from lit_qlora.model.architectures import LINEARS
from lit_qlora.model.loss import CHUNK_ROWS
from lit_qlora.model.offload import IN_TRANSIT
from lit_qlora.model.optimizer import OPTIMIZERS
from lit_qlora.model.shape import NF4_BLOCK, Shape
from lit_qlora.storage.files import GIB

CUDA_CONTEXT = int(0.35 * GIB)
"""Bytes of CUDA's own per process, kernels included. An estimate, not measured on a T4; 0.6 GiB on an H100."""
EXCHANGE = int(0.5 * GIB)
"""Bytes that NCCL holds per process of several: 470 MiB for a first group on an RTX 3060 (sgl-project/sglang#35538),
544 MB for two A100s with NVLink (NVIDIA/nccl#964). Not measured here."""
RECORDING = int(0.47 * 1024**2)
"""Bytes that CUDA keeps per recorded layer, beside torch: 14.8 MiB measured for 32 layers on an H100."""
FRAGMENTATION = 0.085
"""Memory held by torch's allocator beyond its tensors, as a share of all but the activations kept by forward, whose
large blocks leave no gaps: 4 to 9.5 % in 16 settings measured on an H100, with expandable segments
(`cli.prepare_memory`)."""
RESERVE = 0.1
"""The share of a card left free when a setting is chosen: the error of the forecast."""
WORKSPACE = 2 * 8_519_680
"""Workspace of cuBLAS, for the forward's and the backward's thread (`getChosenWorkspaceSize` in torch)."""
HOPPER_WORKSPACE = 2 * 32 * 1024**2
"""The same from compute capability 9.0 on."""

SMALL_BLOCK = 1024**2
"""torch's allocator keeps blocks up to this size in segments of their own (`kSmallSize` in torch)."""

MIN_8BIT, MIN_PAGED, BLOCK_8BIT = 4096, 100_000, 256
"""bitsandbytes keeps smaller tensors' state in fp32, and on the card; 8-bit state has an fp32 scale for each block."""


@dataclass(frozen=True)
class Step:
    """The settings that decide the memory of a training step.

    The layers are those of `model.decoder`; transformers' own, as with DoRA, take more.

    Args:
        shape: of the base.
        tokens: tokens of the largest micro-batch, with padding.
        scored_tokens: number of learned tokens among them.
        rank: LoRA's rank on all ``targets``, unless there are ``ranks``.
        targets: names of the linear layers that have LoRA.
        optimizer: name in `model.optimizer.OPTIMIZERS`.
        kept_layers: number of layers, the last ones, that keep the results of their products and of attention; the
            others keep their input only.
        accumulates: True if a step has several micro-batches, so that gradients of earlier ones are there.
        workspace: bytes of cuBLAS's scratch.
        loss_rows: most learned tokens whose logits are computed at once.
    """

    shape: Shape
    tokens: int
    scored_tokens: int
    rank: int = 16
    targets: tuple[str, ...] = LINEARS
    ranks: tuple[Mapping[str, int], ...] | None = None
    """LoRA's rank by linear layer, for each decoder layer, unless all are ``rank`` on ``targets``."""
    optimizer: str = "adamw"
    kept_layers: int = 0
    hosted_layers: int = 0
    """How many of these, the first ones, send the results of their feed-forward to the host in between."""
    dequantised_layers: int = 0
    """How many layers' weights stay dequantised."""
    together: int = 1
    """Number of micro-batches that go through the layers together, each as large as ``tokens``."""
    element: int = 2
    """Bytes per value: 2 in 16-mixed and bf16-mixed, 4 in 32-true."""
    accumulates: bool = False
    workspace: int = WORKSPACE
    loss_rows: int = CHUNK_ROWS
    is_one_of_several: bool = False
    """True if gradients are exchanged with other cards."""
    num_recordings: int = 0
    """Number of micro-batch shapes for which the layers' kernels are recorded by `model.graphs`."""
    sharers: int = 0
    """Number of processes among which the layers' 4-bit weights are shared (`model.shards`); 0: each has them whole."""
    shares_on_host: bool = False
    """True if each keeps its share in the host's memory."""

    @property
    def uses_cuda_graphs(self) -> bool:
        """True if the layers' kernels are recorded."""
        return self.num_recordings > 0

    @cached_property
    def lora(self) -> tuple[Mapping[str, int], ...]:
        """LoRA's rank by linear layer, for each decoder layer."""
        return self.ranks or (dict.fromkeys(self.targets, self.rank),) * self.shape.num_layers

    @cached_property
    def _kinds(self) -> list[Mapping[str, int]]:
        """`lora`, a mapping that stands for many layers once: an advice looks at thousands of steps."""
        return [*{id(layer): layer for layer in self.lora}.values()]

    @cached_property
    def lora_tensors(self) -> list[int]:
        """Number of weights in each tensor of LoRA, of all layers."""
        of_layer = {
            id(layer): [rank * width for name, rank in layer.items() for width in self.shape.linears[name]]
            for layer in self._kinds
        }
        return [size for layer in self.lora for size in of_layer[id(layer)]]

    @cached_property
    def num_cast(self) -> int:
        """Number of weights in the 16-bit copies of LoRA, which layers of one kind share."""
        kinds = {frozenset(layer.items()) for layer in self._kinds}
        return sum(rank * sum(self.shape.linears[name]) for layer in kinds for name, rank in layer)


def _part(words: str) -> Any:
    """Bytes of torch's allocator, and what a table calls them."""
    return field(default=0, metadata={"words": words})


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the card at one ``moment`` of a step, by purpose: `_part` has the words for each."""

    moment: str
    weights: int = _part("base: linear layers in 4 bits, the rest in 16")
    dequantised: int = _part("weights that stay dequantised, in 16")
    arriving: int = _part("its two layers that are whole at a time")
    adapters: int = _part("adapter, fp32")
    gradients: int = _part("its gradients, fp32")
    optimizer: int = _part("optimizer's state")
    casts: int = _part("16-bit copies of the adapter")  # of one layer: each refills the buffers
    activations: int = _part("activations kept for backward")
    layer: int = _part("one layer in recomputation and backward")
    loss: int = _part("loss: some rows' logits, hidden states")
    dequantisation: int = _part("one dequantised weight")
    recordings: int = _part("buffers of recorded kernels")
    cache: int = _part("keys and values of sample answers")
    workspace: int = _part("cuBLAS's scratch")
    apart: int = 0
    """Bytes that the allocator holds for other moments and can't reuse for this one: of recorded kernels, or for
    them."""
    kernels: int = 0
    """Bytes of recordings that CUDA keeps outside of torch."""
    exchange: int = 0
    """Bytes of NCCL, outside of torch."""

    @property
    def total(self) -> int:
        """Bytes of tensors, to be compared with ``torch.cuda.max_memory_allocated()``."""
        return sum(getattr(self, name) for name in MEMORY_PARTS)

    @property
    def reserved(self) -> int:
        """Bytes held by torch's allocator, to be compared with ``torch.cuda.max_memory_reserved()``."""
        # Shares and buffers of a shared base are a few large blocks, which stay where they are.
        without_gaps = self.activations + (self.weights + self.arriving if self.arriving else 0)
        return self.total + self.apart + int(FRAGMENTATION * (self.total - without_gaps))

    @property
    def on_card(self) -> int:
        """Bytes that the card must have, CUDA's context included."""
        return self.reserved + self.kernels + self.exchange + CUDA_CONTEXT


MEMORY_PARTS = {part.name: part.metadata["words"] for part in fields(StepMemory) if part.metadata}
"""The parts of `StepMemory.total`, in words."""


def share_bytes(step: Step) -> int:
    """Bytes of the base's layers that each process keeps for a ``step``, on its card or on the host."""
    return step.shape.num_layers * math.ceil(step.shape.layer_bytes / max(step.sharers, 1))


def fetched_bytes(step: Step) -> int:
    """Bytes of a shared base that come to each card per pass of a ``step``: layers not there, forward and backward."""
    if not step.sharers:
        return 0
    coming = 1.0 if step.shares_on_host else 1 - 1 / step.sharers
    return int(2 * max(step.shape.num_layers - 2, 0) * step.shape.layer_bytes * coming)


def base_on_host_bytes(step: Step) -> int:
    """Page-locked bytes of the hosts, of all processes together, for the shares of a base in a ``step``."""
    return step.sharers * share_bytes(step) if step.shares_on_host else 0


def optimizer_bytes(name: str, tensors: list[int]) -> tuple[int, int]:
    """Optimizer state on the card, and state that is paged to the host when the card runs short.

    Args:
        name: of the optimizer, in `OPTIMIZERS`.
        tensors: numbers of weights of each trained tensor.

    Returns:
        Both in bytes.
    """
    optimizer = OPTIMIZERS[name]
    on_card = paged = 0
    for size, count in Counter(tensors).items():
        scales = 0
        state = 4 * optimizer.states * size
        if optimizer.in_8_bits and size >= MIN_8BIT:
            state, scales = optimizer.state_bytes * size, 4 * optimizer.states * math.ceil(size / BLOCK_8BIT)
        if optimizer.is_paged and size >= MIN_PAGED:
            paged += count * state
        else:
            on_card += count * state
        on_card += count * scales
    return on_card, paged


# Activations, in bytes per token


def kept_in_layer(step: Step) -> int:
    """Bytes per token of a ``step`` that a layer keeps beyond its input: 10 h + 4 I values, and those between LoRA's A
    and B.
    """
    return sum(_kept_tensors(step))


def _kept_tensors(step: Step) -> list[int]:
    """Bytes per token of each tensor that a layer keeps beyond its input.

    Those are q and k turned, v, attention's result with one fp32 sum per head, the residual in the middle, gate and up,
    for each linear layer with LoRA what lies between A and B, and q and k before their norms if they have such.
    """
    shape = step.shape
    queries, keys = shape.linears["q_proj"][1], shape.linears["k_proj"][1]
    inner = shape.linears["gate_proj"][1]
    low = max((layer.values() for layer in step.lora), key=sum)
    unnormed = (queries, keys) if shape.has_head_norms else ()
    widths = (queries, queries, keys, keys, shape.hidden, inner, inner, *low, *unnormed)
    return [step.element * width for width in widths] + [4 * shape.num_heads]


def hosted_in_layer(step: Step) -> int:
    """Bytes per token of a ``step`` that a layer sends to the host: the residual in the middle, gate and up."""
    return step.element * (step.shape.hidden + 2 * step.shape.linears["gate_proj"][1])


def host_bytes(step: Step) -> int:
    """Page-locked bytes of the host, for what the largest micro-batch of a ``step`` sends there."""
    return step.together * step.tokens * step.hosted_layers * hosted_in_layer(step)


def small_blocks(step: Step) -> int:
    """Segments of small blocks that recordings of short micro-batches need and the longest doesn't.

    Recordings share their memory, but what is a large block in one of many tokens is a small one in one of few.

    Returns:
        Bytes: the most that kept activations take in small blocks at any number of tokens, beyond what they do at
        ``step.tokens``. 0 for a single recording.
    """
    shape = step.shape
    widths = _kept_tensors(step) * step.kept_layers + [step.element * shape.hidden] * shape.num_layers

    def small(tokens: int) -> int:
        return sum(width * tokens for width in widths if width * tokens <= SMALL_BLOCK)

    shorter = {SMALL_BLOCK // width for width in widths} if step.num_recordings > 1 else set()
    return max(map(small, {step.tokens} | {tokens for tokens in shorter if tokens < step.tokens})) - small(step.tokens)


def swiglu_backward_peak(step: Step) -> int:
    """Bytes per token of a layer's peak in backward, beyond what a ``step`` keeps: the residual's gradient, four of
    SwiGLU's.
    """
    return step.element * (step.shape.hidden + 4 * step.shape.linears["gate_proj"][1])


def kept_activations(step: Step) -> int:
    """Bytes per token of a ``step`` on the card, of all layers, once forward is through; with those that come or go."""
    layers = step.shape.num_layers
    away = (
        step.hosted_layers - max(0, IN_TRANSIT - (step.kept_layers - step.hosted_layers)) if step.hosted_layers else 0
    )
    kept = step.kept_layers * kept_in_layer(step) - max(0, away) * hosted_in_layer(step)
    return layers * step.element * step.shape.hidden + kept


# Moments, in bytes


def loss_bytes(step: Step) -> int:
    """Bytes of the last norm and the chunked cross entropy of a ``step``, in its last chunk: logits in 16 bits and
    fp32.
    """
    hidden, rows = step.shape.hidden, min(step.scored_tokens, step.loss_rows)
    copies = 4 if step.element == 4 else 4 + step.element
    logits = rows * step.shape.vocabulary * copies
    states = step.tokens * (4 + step.element) * hidden + 2 * step.scored_tokens * step.element * hidden
    # Of those before in the same pass, their hidden states after the layers' norm and the scored ones' gradient.
    states += (step.together - 1) * step.element * hidden * (2 * step.tokens + step.scored_tokens)
    return logits + states + rows * step.element * hidden


def moments(step: Step) -> list[StepMemory]:
    """The moments of a step that can be its peak, from the second step on.

    Args:
        step: settings and sizes of the largest micro-batch.

    Returns:
        One of each moment, in bytes.
    """
    shape, size = step.shape, step.element
    lora = sum(step.lora_tensors)
    weights = {name: size * inputs * outputs for name, (inputs, outputs) in shape.linears.items()}
    # What is dequantised for one product, unless it stays: the widest, with its scales, in fp32 and once more with
    # their offset; or a layer's, held from one micro-batch to the next, but for a shared base's.
    widest = max(weights.values())
    is_single = step.together == 1 or step.sharers > 0
    scratch = widest + 8 * widest // size // NF4_BLOCK if is_single else sum(weights.values())
    is_open = step.dequantised_layers == shape.num_layers
    state, others = size * shape.hidden, step.together - 1
    always = StepMemory(
        "",
        weights=shape.unshared_bytes(size) + (0 if step.shares_on_host else share_bytes(step)),
        arriving=2 * shape.layer_bytes if step.sharers else 0,
        dequantised=step.dequantised_layers * sum(weights.values()),
        adapters=4 * lora,
        optimizer=optimizer_bytes(step.optimizer, step.lora_tensors)[0],
        casts=size * step.num_cast,
        workspace=step.workspace,
        kernels=RECORDING * shape.num_layers * step.num_recordings,
        exchange=EXCHANGE if step.is_one_of_several else 0,
    )
    activations = step.together * step.tokens * kept_activations(step)
    recomputed = shape.num_layers - step.kept_layers
    # During recomputation, a layer holds all its weights but the last dequantised, for the backward that follows; one
    # of a shared base, for which memory is short, dequantises them again.
    held = sum(weights.values()) - (weights["down_proj"] if step.together == 1 else 0)
    again = replace(
        always,
        # Of the others that go with it, the gradients before and behind the layer.
        layer=step.tokens * (kept_in_layer(step) + swiglu_backward_peak(step) + 2 * others * state),
        dequantisation=0 if is_open else scratch if step.sharers else held,
    )
    once = replace(
        always,
        # Or the last norm, in fp32; of the others that go with it, what the norm and the loss keep.
        layer=step.tokens * (max(swiglu_backward_peak(step), 24 * shape.hidden) + 3 * others * state),
        dequantisation=0 if is_open else scratch,
    )
    # The last step's gradients exist until backward begins; with accumulation all the time, and each micro-batch
    # computes its own beside them, so that it can be retried (`learning.LearnsInParts`).
    accumulated = 4 * lora if step.accumulates and not step.uses_cuda_graphs else 0
    found = [
        replace(always, moment="loss", activations=activations, gradients=4 * lora, loss=loss_bytes(step)),
        replace(once, moment="start of backward", activations=activations, gradients=accumulated),
        replace(again if recomputed else once, moment="end of backward", gradients=4 * lora + accumulated,
                activations=step.together * step.tokens
                * (size * shape.hidden + (0 if recomputed else kept_in_layer(step)))),
        replace(always, moment="update", gradients=4 * lora, layer=4 * lora * OPTIMIZERS[step.optimizer].scratch),
    ]  # fmt: skip
    if recomputed:
        done = 4 * lora * step.kept_layers // shape.num_layers
        found.append(
            replace(
                again,
                moment="backward of the last recomputed layer",
                activations=step.together * step.tokens * recomputed * size * shape.hidden,
                gradients=accumulated + done,
            )
        )
    return _with_recordings(step, found) if step.uses_cuda_graphs else found


def step_memory(step: Step) -> StepMemory:
    """The moment with the highest memory. Evaluation takes less: the same batches, with nothing kept for a backward.

    Args:
        step: settings and sizes of the largest micro-batch.
    """
    return max(moments(step), key=lambda moment: moment.reserved)


def _with_recordings(step: Step, once: list[StepMemory]) -> list[StepMemory]:
    """The moments of `moments` with recorded kernels, which have a memory pool of their own."""
    shape, lora = step.shape, 4 * sum(step.lora_tensors)

    def inside(moment: StepMemory) -> int:
        return moment.activations + moment.layer + moment.dequantisation + moment.gradients

    outside = [moment for moment in once if moment.moment in ("loss", "update")]
    deepest = max((moment for moment in once if moment not in outside), key=inside)
    states = 2 * step.element * step.tokens * shape.hidden
    # Before each recording one layer runs unrecorded, which takes more than an evaluation.
    warmed = max(moment.layer + moment.dequantisation for moment in once if moment not in outside)
    beside = max(warmed, *(moment.loss + moment.layer for moment in outside)) + small_blocks(step)
    held = inside(deepest) + small_blocks(step)
    others = [replace(moment, activations=0, recordings=states, apart=held) for moment in outside]
    found = [replace(deepest, gradients=deepest.gradients + lora, recordings=states, apart=beside), *others]
    # The streams that record forward and backward have scratch of their own, which stays.
    return [replace(moment, workspace=2 * step.workspace) for moment in found]


@dataclass(frozen=True)
class Samples:
    """Sample answers, all written at once.

    Args:
        num_prompts: number of prompts.
        prompt_tokens: tokens of the longest prompt.
        new_tokens: most new tokens of each answer.
        are_own: True if the prompts are the user's.
        are_assumed: True if ``prompt_tokens`` is not counted.
    """

    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    are_own: bool = False
    are_assumed: bool = False


NO_SAMPLES = Samples(0, 0, 0)


def run_moments(step: Step, samples: Samples) -> list[StepMemory]:
    """All moments whose memory a run needs.

    Args:
        step: settings and sizes of the largest micro-batch.
        samples: drawn in one batch.

    Returns:
        The moments of a step, and that of sample answers if there are any, in bytes.
    """
    found = moments(step)
    return [*found, *([sampling_memory(step, samples, found)] if samples.num_prompts else [])]


def sampling_memory(step: Step, samples: Samples, found: list[StepMemory]) -> StepMemory:
    """Bytes while sample answers are drawn: keys and values of all layers, and one layer's forward over the prompts.

    Args:
        step: settings and sizes of the largest micro-batch.
        samples: drawn in one batch.
        found: the moments of the step, of which what the update holds is counted, too.
    """
    shape, tokens = step.shape, samples.num_prompts * samples.prompt_tokens
    kept = tokens + samples.num_prompts * samples.new_tokens
    cache = 2 * step.element * shape.linears["k_proj"][1] * shape.num_layers * kept
    return replace(_forward_moment(step, tokens, found), moment="sample answers", cache=cache)


def scoring_memory(step: Step) -> StepMemory:
    """Bytes while the micro-batch of a ``step`` is scored and nothing trained: one layer's forward, no gradients."""
    forward = _forward_moment(step, step.tokens, moments(step))
    return replace(forward, moment="scoring", optimizer=0, gradients=0, loss=loss_bytes(step))


def _forward_moment(step: Step, tokens: int, found: list[StepMemory]) -> StepMemory:
    """The update's moment of ``found``, with one layer's forward over so many tokens: an upper bound."""
    shape, update = step.shape, next(moment for moment in found if moment.moment == "update")
    forward = tokens * step.element * (6 * shape.hidden + 5 * shape.linears["gate_proj"][1])
    scratch = step.element * max(inputs * outputs for inputs, outputs in shape.linears.values())
    return replace(update, layer=forward, dequantisation=scratch)


def fits(step: Step, card_bytes: float, samples: Samples = NO_SAMPLES) -> bool:
    """True if a run leaves the share `RESERVE` of a card free.

    Args:
        step: of the largest micro-batch.
        card_bytes: memory of the card.
        samples: drawn in one batch.
    """
    return all(moment.on_card <= card_bytes * (1 - RESERVE) for moment in run_moments(step, samples))


def place_layers(step: Step, card_bytes: float, samples: Samples = NO_SAMPLES, most_hosted: int = 0) -> tuple[int, int]:
    """Choose where layers keep their products' results.

    Args:
        step: of the largest micro-batch.
        card_bytes: memory of the card.
        samples: drawn in one batch.
        most_hosted: number of layers whose feed-forward the host has the room and the bus the time for.

    Returns:
        The most layers that can keep them, and the fewest of these that must send a part to the host; else 0, 0.
    """

    def has_room(kept: int, hosted: int) -> bool:
        return fits(replace(step, kept_layers=kept, hosted_layers=hosted), card_bytes, samples)

    for kept in range(step.shape.num_layers, 0, -1):
        most = min(kept, most_hosted)
        if has_room(kept, most):
            return kept, bisect_left(range(most), True, key=lambda hosted: has_room(kept, hosted))
    return 0, 0
