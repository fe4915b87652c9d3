"""Owns the bytes of a training step by formula: what is held at each of its moments, part by part.

The coefficients are counted, not fitted: `tests/model/test_memory.py` measures them on a small model with torch's
own allocator. Knows no torch, no card and no data; sizes and settings go in, bytes come out.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

from lit_qlora.model.shape import Shape

GIB = 1024**3

CONTEXT = int(0.35 * GIB)
"""What CUDA itself takes of a card for a process, kernels included. An estimate, not measured on a T4."""
FRAGMENTATION = 0.03
"""What torch's allocator holds of the card beyond its tensors; 2 to 4 % is seen. An estimate."""
RESERVE = 0.05
"""The share of a card left free where a setting is chosen: as far as the prediction may be wrong."""
WORKSPACE = 2 * 8_519_680
"""cuBLAS's scratch, for the forward's and the backward's thread (`getChosenWorkspaceSize` in torch)."""
HOPPER_WORKSPACE = 2 * 32 * 1024**2
"""The same from compute capability 9.0 on."""

CHUNK_ROWS = 1024
"""`loss.CHUNK_ROWS`, which can't be imported without torch; a test holds them equal."""

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_TABLES = 4 * (16 + 256 + 1)
"""Each 4-bit weight's code books, and the offset of its scales, in fp32."""

MIN_8BIT, MIN_PAGED, BLOCK_8BIT = 4096, 100_000, 256
"""bitsandbytes keeps smaller tensors' state in fp32, and on the card; 8-bit state has an fp32 scale for each block."""


@dataclass(frozen=True)
class Step:
    """What decides the memory of a training step.

    ``tokens`` is the largest micro-batch with padding, ``scored_tokens`` those of it that are learned, and
    ``row_tokens`` its longest row. ``kept_layers`` is how many layers keep the results of their 4-bit products
    and of attention, the others keeping their input only; None is no recomputation at all.
    """

    shape: Shape
    tokens: int
    scored_tokens: int
    row_tokens: int
    rank: int = 16
    targets: tuple[str, ...] = Shape.LINEARS
    dropout: bool = False
    optimizer: str = "adamw"
    kept_layers: int | None = 0
    element: int = 2
    """Bytes of the precision: 2 in 16-mixed and bf16-mixed, 4 in 32-true."""
    accumulates: bool = False
    eager_attention: bool = False
    workspace: int = WORKSPACE

    @cached_property
    def lora_tensors(self) -> list[int]:
        """Weights in each tensor of LoRA, of all layers."""
        return [self.rank * width for name in self.targets for width in self.shape.linears[name]] * (
            self.shape.num_layers
        )


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the card at one moment of a step, by what they are for."""

    moment: str
    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    casts: int = 0
    """16-bit copies of LoRA's weights, which autocast makes and backward needs."""
    activations: int = 0
    """What forward keeps for backward, of all layers."""
    layer: int = 0
    """What one layer takes while it is computed again and its gradient formed."""
    loss: int = 0
    """Logits, a chunk of rows at a time, and the last hidden states with their gradient."""
    dequantisation: int = 0
    """The one 4-bit weight that stands in 16 bits just now."""
    cache: int = 0
    """Keys and values of the sample answers."""
    workspace: int = 0

    @property
    def total(self) -> int:
        """To be compared with ``torch.cuda.max_memory_allocated()``."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "moment")

    @property
    def reserved(self) -> int:
        """To be compared with ``torch.cuda.max_memory_reserved()``."""
        return int(self.total * (1 + FRAGMENTATION))

    @property
    def on_card(self) -> int:
        """All that the card must have, CUDA's context included."""
        return self.reserved + CONTEXT


def weight_bytes(shape: Shape, element: int = 2) -> int:
    """The loaded base: linear layers in NF4 with double quantisation, all else in the precision."""
    quantized = 0
    for inputs, outputs in shape.linears.values():
        scales = math.ceil(inputs * outputs / NF4_BLOCK)
        quantized += inputs * outputs // 2 + scales + 4 * math.ceil(scales / NF4_NESTED_BLOCK) + NF4_TABLES
    return shape.num_layers * quantized + element * (shape.num_parameters - shape.num_quantized)


def optimizer_bytes(name: str, tensors: list[int]) -> tuple[int, int]:
    """State on the card, and state that is paged out to the host where the card is short."""
    on_card = paged = 0
    for size in tensors:
        scales = 0
        state = 8 * size
        if name.endswith("8bit") and size >= MIN_8BIT:
            state, scales = 2 * size, 8 * math.ceil(size / BLOCK_8BIT)
        if name.startswith("paged") and size >= MIN_PAGED:
            paged += state
        else:
            on_card += state
        on_card += scales
    return on_card, paged


# Activations, in bytes a token


def saved_without_recomputation(step: Step) -> int:
    """What autograd keeps of one decoder layer: of Llama 2 with LoRA on all layers, 20 h + 8 I in 16 bits."""
    shape, size = step.shape, step.element
    inner = shape.linears["gate_proj"][1]
    queries, keys = shape.linears["q_proj"][1], shape.linears["k_proj"][1]
    # Two norms, which are computed in fp32, each with its scale; attention's inputs and its result, with
    # one fp32 sum a head; of SwiGLU the gate before and after its activation, and its partner.
    saved = 2 * (4 * shape.hidden + 4) + size * (2 * queries + 2 * keys) + 4 * shape.num_heads + 3 * size * inner
    if step.eager_attention:
        # The softmax in fp32, and its cast. What its backward takes is not modelled: it may top the figure.
        saved += (4 + size) * shape.num_heads * step.row_tokens
    targets = {*step.targets}
    saved += sum(size * step.rank for _ in targets)  # LoRA's narrow middle
    if step.dropout:  # each LoRA drops a copy of its own, and keeps the mask
        saved += sum((size + 1) * shape.linears[name][0] for name in targets)
    else:  # the inputs themselves, each once; that of o_proj is attention's result
        inputs = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
        saved += sum(size * shape.hidden for names in inputs if names & targets)
        saved += size * inner if "down_proj" in targets else 0
    return saved


def saved_selectively(step: Step) -> int:
    """A layer that keeps its input, the results of its 4-bit products and of attention: 14 h + 4 I."""
    shape = step.shape
    results = sum(outputs for _, outputs in shape.linears.values()) + shape.linears["q_proj"][1]
    return step.element * (shape.hidden + results) + 4 * shape.num_heads


def _backward_of_swiglu(step: Step) -> int:
    """Beyond what a layer keeps: the residual's gradient and three of SwiGLU's, with down_proj's share gone."""
    inner, size = step.shape.linears["gate_proj"][1], step.element
    freed = 0
    if "down_proj" in step.targets:
        freed = size * inner + size * step.rank + (inner if step.dropout else 0)
    return size * (step.shape.hidden + 3 * inner) - freed


def layer_peak(step: Step) -> int:
    """One layer that is recomputed: all that it keeps, and the higher of the two points that top it.

    They are down_proj's turn in the second forward, and SwiGLU's in backward.
    """
    inner, size = step.shape.linears["gate_proj"][1], step.element
    forward = 5 * size * step.shape.hidden + (size * inner if step.dropout and "down_proj" in step.targets else 0)
    return saved_without_recomputation(step) + max(forward, _backward_of_swiglu(step))


def kept_activations(step: Step) -> int:
    """Of all layers, once forward is through."""
    layers = step.shape.num_layers
    if step.kept_layers is None:
        # Nothing before the first layer learns, so its first norm keeps nothing.
        return layers * saved_without_recomputation(step) - (4 * step.shape.hidden + 4)
    inputs = (layers - step.kept_layers) * step.element * step.shape.hidden
    return inputs + step.kept_layers * saved_selectively(step)


# Moments, in bytes


def loss_bytes(step: Step) -> int:
    """The last norm and the chunked cross entropy, while its last chunk is under way.

    A chunk's logits stand in 16 bits and in fp32; from the second chunk on, the first one's are still there.
    """
    hidden, rows = step.shape.hidden, min(step.scored_tokens, CHUNK_ROWS)
    copies = 4 if step.element == 4 else 4 + step.element
    logits = rows * step.shape.vocabulary * (copies + (4 if step.scored_tokens > CHUNK_ROWS else 0))
    states = step.tokens * (4 + step.element) * hidden + 2 * step.scored_tokens * step.element * hidden
    return logits + states + rows * step.element * hidden


def moments(step: Step) -> list[StepMemory]:
    """The moments of a step that can be its highest, from the second step on."""
    shape = step.shape
    lora = sum(step.lora_tensors)
    casts = 0 if step.element == 4 else step.element * lora
    if step.kept_layers is not None:
        casts //= shape.num_layers
    widest = max(inputs * outputs for inputs, outputs in shape.linears.values())
    scratch = step.element * widest + 8 * widest // NF4_BLOCK  # its scales, in fp32 and once more with their offset
    always = StepMemory(
        "",
        weights=weight_bytes(shape, step.element),
        adapters=4 * lora,
        optimizer=optimizer_bytes(step.optimizer, step.lora_tensors)[0],
        workspace=step.workspace,
    )
    activations = step.tokens * kept_activations(step)
    one_layer = step.tokens * (layer_peak(step) if step.kept_layers is not None else _backward_of_swiglu(step))
    during = replace(always, casts=casts, dequantisation=scratch)
    # Computing a layer again takes up what it has kept. Where only some keep, as if those were the first ones.
    all_keep = step.kept_layers == shape.num_layers
    used = step.tokens * (saved_selectively(step) - step.element * shape.hidden) if all_keep else 0
    # The last step's gradients are there until backward begins; while micro-batches add up, all the time.
    return [
        replace(during, moment="loss", activations=activations, gradients=4 * lora, loss=loss_bytes(step)),
        replace(
            during,
            moment="start of backward",
            activations=activations - used,
            gradients=4 * lora if step.accumulates else 0,
            layer=max(one_layer, 24 * shape.hidden * step.tokens),  # or the last norm, in fp32
        ),
        replace(
            during,
            moment="end of backward",
            # The first layer's own part of the activations is in the one layer where nothing is recomputed.
            activations=step.tokens * saved_without_recomputation(step) if step.kept_layers is None else 0,
            gradients=4 * lora,
            layer=one_layer,
        ),
        # torch's AdamW has the roots of its second moments as a whole; bitsandbytes works in place.
        replace(always, moment="update", gradients=4 * lora, layer=4 * lora if step.optimizer == "adamw" else 0),
    ]


def step_memory(step: Step) -> StepMemory:
    """The highest moment. Evaluation takes less: the same batches, with nothing kept for a backward."""
    return max(moments(step), key=lambda moment: moment.total)


def sampling_memory(step: Step, num_prompts: int, prompt_tokens: int, new_tokens: int) -> StepMemory:
    """While sample answers are drawn: keys and values of all layers, and one layer's forward over the prompts."""
    shape, size = step.shape, step.element
    inner, keys = shape.linears["gate_proj"][1], shape.linears["k_proj"][1]
    update = next(moment for moment in moments(step) if moment.moment == "update")
    cache = 2 * size * keys * shape.num_layers * num_prompts * (prompt_tokens + new_tokens)
    forward = num_prompts * prompt_tokens * size * (6 * shape.hidden + 5 * inner)  # an upper bound
    scratch = size * max(inputs * outputs for inputs, outputs in shape.linears.values())
    return replace(update, moment="sample answers", cache=cache, layer=forward, dequantisation=scratch)


def most_kept_layers(step: Step, card_bytes: int, reserve: float = RESERVE) -> int:
    """The most layers that can keep their products' results on a card of ``card_bytes``; 0 where none can."""
    room = card_bytes * (1 - reserve)
    fitting = (
        kept
        for kept in range(step.shape.num_layers, 0, -1)
        if step_memory(replace(step, kept_layers=kept)).on_card <= room
    )
    return next(fitting, 0)
