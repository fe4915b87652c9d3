"""Owns the words of an inspection on a terminal, in 80 columns; colour is an addition, never the only sign.

A row's place alone is never cut or broken, however long its path, so that it can be copied. Knows a look, no options
and no files.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from lit_qlora.columns import columns, in_column, lines_of, printable, shortened
from lit_qlora.console import WIDTH
from lit_qlora.data.faults import KINDS
from lit_qlora.data.row_files import split_place
from lit_qlora.data.view import Token, stretches
from lit_qlora.tools.inspecting.look import Batching, Found, Look, Part, Shown
from lit_qlora.tools.inspecting.verdict import FAULT_REMEDIES
from lit_qlora.wording import number_of, of_number

BAR = 40
NAMED_IN_TERMINAL = 5
"""Rows that are named for each fault, and doubles of each kind; the page has all."""
FEW = 3
"""Rows of a part, at most, that are named, such as what is held out of a small file."""
NUMBERS = 100
"""Rows of a file whose numbers are listed after those that are named."""
HEAD, TAIL = 4, 2
"""Lines shown at the beginning and at the end of a long stretch."""

DOUBLES = {
    "same": "the same words",
    "near": "nearly the same words",
    "question": "the same first question, another answer",
}
FINE = "each answer's end is learned, no BOS is missing or doubled, no token loses anything"
LEGEND = "| between tokens   «» a special token   ↵ a line's end"

GREEN, MAGENTA, DIM, BOLD, RED = "32", "35", "2", "1", "31"


class Bin(NamedTuple):
    """A bar of the histogram of lengths.

    Args:
        first: fewest tokens of a conversation in it.
        last: most tokens of a conversation in it.
        size: number of conversations.
        is_cut: True if they are longer than the cap.
    """

    first: int
    last: int
    size: int
    is_cut: bool


def inspection_lines(seen: Look, accepted: Collection[str], colour: bool = False, whole: bool = False) -> Iterator[str]:
    """The lines of an inspection; the verdict is last.

    Args:
        seen: look at a fit's rows.
        accepted: kinds of faults that are meant to be so.
        colour: True to use escape sequences for colours.
        whole: True to show the middle of long stretches of a row, too.
    """
    parts = (_counts(seen), _lines_of_losses(seen), _histogram(seen), _batchings(seen), _doubles(seen))
    for part in parts:
        yield from part
        yield ""
    for row in seen.shown:
        yield from _row_lines(row, colour, whole)
    if seen.shown:
        yield f"  {LEGEND}"
        yield ""
    yield from _verdict(seen, accepted, colour)


# What there is


def _counts(seen: Look) -> Iterator[str]:
    yield f"{'':30}" + "".join(f"{part.name:>14}" for part in seen.parts)
    for title, values in part_figures(seen.parts):
        yield f"{title:30}" + "".join(f"{value:>14,}" for value in values)
    for part in seen.parts:
        few = f" ({', '.join(part.where)})" if len(part.where) <= FEW else ""
        yield f"{part.name}: {printable(part.source + few)}"
        yield from (f"  {line}" for line in source_lines(part))
        for note in part.notes:
            yield from _wrapped(note, "  ")
    for note in seen.notes:
        yield from _wrapped(note)


def source_lines(part: Part) -> list[str]:
    """Conversations and left-out rows of each of the sources of ``part``, where there are several."""
    return [
        f"{count:>9,} of {printable(name)}" + (f", {number_of(lost, 'rows')} left out" if lost else "")
        for name, count, lost in part.sources
    ]


def part_figures(parts: Sequence[Part]) -> list[tuple[str, list[int]]]:
    """The figures of each of ``parts``, by their titles."""
    return [
        ("rows", [part.num_rows for part in parts]),
        ("  left out", [len(part.left_out) + part.kept.count(0) for part in parts]),
        ("conversations in batches", [len(part.kept) - part.kept.count(0) for part in parts]),
        ("  of them cut", [part.num_cut for part in parts]),
        ("turns", [part.num_turns for part in parts]),
        ("tokens before any cut", [sum(part.lengths) for part in parts]),
        ("tokens in batches", [sum(part.kept) for part in parts]),
        ("  answer tokens, learned", [sum(part.learned) for part in parts]),
    ]


def losses(part: Part, max_length: int) -> list[tuple[int, str]]:
    """What is dropped, cut, not used or changed in a part, each with its number of rows.

    Args:
        part: rows that are learned, or held out.
        max_length: tokens of one row.
    """
    first, token = part.spelled[0] if part.spelled else ("", "")
    found = [
        *part.dropped,
        (part.num_cut, f"cut to data.max_length {max_length:,}"),
        (part.num_divided, f"texts longer than data.max_length {max_length:,}, divided into several rows"),
        (part.kept.count(0), f"left out: no answer within data.max_length {max_length:,}"),
        (
            len(part.spelled),
            f"rows with a special token spelled out, learned as letters alone, such as {token} in {first}",
        ),
    ]
    return [(count, of_number(count, what)) for count, what in found if count]


def _lines_of_losses(seen: Look) -> Iterator[str]:
    yield "dropped, cut, not used"
    found = [(part.name, *loss) for part in seen.parts for loss in losses(part, seen.max_length)]
    for name, count, what in found:
        yield from _wrapped(what, f"  {name:<10}{count:>7,}  ")
    if not found:
        yield "  nothing"


def lengths_in_words(seen: Look) -> str:
    """Mean, median, 95 % quantile and maximum of the tokens per conversation that were ``seen``."""
    lengths = sorted(length for part in seen.parts for length in part.lengths)
    p95 = lengths[max(0, -(-len(lengths) * 95 // 100) - 1)]
    figures = f"mean {statistics.mean(lengths):,.0f}, median {statistics.median(lengths):,.0f}, 95 % up to {p95:,}"
    return f"{figures}, longest {lengths[-1]:,}"


def longest(seen: Look) -> str:
    """The place of the longest conversation that was ``seen``."""
    _, place = max(pair for part in seen.parts for pair in zip(part.lengths, part.where, strict=True))
    return printable(place)


def bins(seen: Look) -> list[Bin]:
    """Lengths ``seen``, before any cut: eight steps up to the cap, behind it each as wide as all before it."""
    lengths = [length for part in seen.parts for length in part.lengths]
    edges = [round(seen.max_length * part / 8) for part in range(9)]
    while edges[-1] < max(lengths):
        edges.append(2 * edges[-1])
    found = Counter(next(place for place, edge in enumerate(edges[1:]) if length <= edge) for length in lengths)
    return [Bin(first + 1, last, found[place], place >= 8) for place, (first, last) in enumerate(pairwise(edges))]


def cap_in_words(seen: Look) -> str:
    """How many conversations of those ``seen`` are longer than the cap, and what they lose."""
    pairs = [pair for part in seen.parts for pair in zip(part.lengths, part.kept, strict=True)]
    longer = sum(length > seen.max_length for length, _ in pairs)
    lost, are = sum(length - kept for length, kept in pairs), "is" if longer == 1 else "are"
    return f"data.max_length {seen.max_length:,}: {longer:,} {are} longer, {lost:,} tokens fall off"


def _histogram(seen: Look) -> Iterator[str]:
    yield "length in tokens, before any cut"
    yield from _placed(f"  {lengths_in_words(seen)}:", longest(seen), is_place=True)
    found = bins(seen)
    most = max(one.size for one in found)
    for number, one in enumerate(found):
        if one.is_cut and not found[number - 1].is_cut:
            yield f"  {'':-<{WIDTH - 2}}"
        bar = "#" * -(-one.size * BAR // most)
        yield f"  {one.first:>7,} to {one.last:>7,}  {one.size:>8,}  {bar}".rstrip()
    yield f"  {cap_in_words(seen)}"


# Batches


def batching_name(batching: Batching) -> str:
    """The options that choose ``batching``."""
    plan = batching.plan
    by = f"batch_tokens {plan.tokens:,}" if plan.tokens else f"batch_size {plan.rows}"
    return f"{by}, packing" if plan.packed else by


def run_in_words(seen: Look) -> str:
    """The steps of the whole run ``seen``, and its share of an epoch if it does not take all of one."""
    steps, taken = number_of(seen.num_steps, "steps"), seen.num_taken
    whole = next(one.micro_batches for one in seen.batchings if one.is_chosen)
    some = "" if taken == whole else f", with {taken:,} of {whole:,} micro-batches per epoch"
    return f"the whole run: {steps}{some}"


def _batchings(seen: Look) -> Iterator[str]:
    yield f"{'batches of an epoch':32}{'micro-batches':>14}{'steps':>10}{'padding':>10}"
    for batching in seen.batchings:
        chosen = "  <- this run" if batching.is_chosen else ""
        figures = f"{batching.micro_batches:>14,}{batching.steps:>10,}{batching.padding:>10.1%}"
        yield f"  {batching_name(batching):30}{figures}{chosen}"
    yield f"  {run_in_words(seen)}"


# Doubles


def doubles_of(seen: Look, kind: str) -> list[tuple[str, str]]:
    """The places of the held-out and the training row of each double of a ``kind`` that was ``seen``."""
    train, held_out = seen.parts
    return [(held_out.where[one], train.where[other]) for one, other, found in seen.doubles if found == kind]


def _doubles(seen: Look) -> Iterator[str]:
    yield "held-out conversations that training has, too"
    for kind, title in DOUBLES.items():
        found = doubles_of(seen, kind)
        yield f"  {title:42}{len(found):>7,}"
        for one, other in found[:NAMED_IN_TERMINAL]:
            yield from _placed(f"    {printable(one)}", f"is like {printable(other)}", is_place=True)


# Rows


def title_of(row: Shown) -> tuple[str, str]:
    """The place of a ``row``; and its part and size."""
    learned = sum(token.learned for token in row.tokens)
    return printable(row.where), f"({row.part}): {len(row.tokens):,} tokens, {learned:,} learned"


def _row_lines(row: Shown, colour: bool, whole: bool) -> Iterator[str]:
    yield from _placed(*title_of(row))
    for learned, run in stretches(row.tokens):
        label = "learned" if learned else "ignored"
        wrapped = [*_stretch(run, WIDTH - 11, colour)]
        if not whole and len(wrapped) > HEAD + TAIL + 1:
            left = len(wrapped) - HEAD - TAIL
            wrapped[HEAD:-TAIL] = [f"… {left} lines …"]
        for number, line in enumerate(wrapped):
            yield f"  {label if not number else '':7}  {line}"


def _stretch(run: Sequence[Token], width: int, colour: bool) -> Iterator[str]:
    """Lines of tokens, separated by strokes and broken between tokens if possible."""
    line, taken = "", 0
    for number, token in enumerate(run):
        text = f"«{token.text}»" if token.special else token.text
        text = shortened(text, width - 1) + ("|" if number < len(run) - 1 else "")
        if taken + columns(text) > width:
            yield line
            line, taken = "", 0
        code = f"{BOLD};{MAGENTA}" if token.special else GREEN if token.learned else DIM
        line, taken = line + (_painted(text, code) if colour else text), taken + columns(text)
    yield line


def _painted(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"


# The verdict


def by_kind(found: Sequence[Found], accepted: Collection[str] = ()) -> dict[str, list[Found]]:
    """Faults by their kind, the gravest kind first.

    Args:
        found: all of them.
        accepted: kinds that are left out, for they are meant to be so.
    """
    kinds = defaultdict[str, list[Found]](list)
    for one in found:
        kinds[one.fault.kind].append(one)
    return {kind: kinds[kind] for kind in KINDS if kinds[kind] and kind not in accepted}


def num_rows(found: Iterable[Found]) -> int:
    """Number of rows with the faults that were ``found``: one may have several."""
    return len({one.where for one in found})


def accepted_in(seen: Look, accepted: Collection[str]) -> list[tuple[str, int]]:
    """The kinds of faults ``accepted`` that were ``seen``, in words, with their rows."""
    kinds = by_kind(seen.found)
    return [(KINDS[kind], num_rows(kinds[kind])) for kind in accepted if kind in kinds]


def verdict_in_words(seen: Look, accepted: Collection[str]) -> str:
    """The verdict on what was ``seen`` in a line, without faults of the ``accepted`` kinds."""
    kinds = by_kind(seen.found, accepted)
    rows = num_rows(one for found in kinds.values() for one in found)
    if rows:
        return "1 row is not as it should be" if rows == 1 else f"{rows:,} rows are not as they should be"
    return f"as it should be: {FINE}"


def _verdict(seen: Look, accepted: Collection[str], colour: bool) -> Iterator[str]:
    for title, count in accepted_in(seen, accepted):
        yield f"accepted: {title}: {count:,}"
    for kind, found in by_kind(seen.found, accepted).items():
        yield f"{number_of(num_rows(found), KINDS[kind])} (--accept {kind})"
        for one in found[:NAMED_IN_TERMINAL]:
            yield from _placed(f"    {printable(one.where)}:", one.fault.words)
        if len(found) > NAMED_IN_TERMINAL:
            yield from _wrapped(f"also {_row_numbers(one.where for one in found[NAMED_IN_TERMINAL:])}", "    ")
        yield from _wrapped(FAULT_REMEDIES[kind], "    ")
    words = f"verdict: {verdict_in_words(seen, accepted)}"
    code = RED if by_kind(seen.found, accepted) else GREEN
    for line in _wrapped(words):
        yield _painted(line, f"{BOLD};{code}") if colour else line


def _row_numbers(places: Iterable[str]) -> str:
    """The numbers of rows behind the names of their files, not all of very many."""
    by_file = defaultdict[str, list[str]](list)
    for place in dict.fromkeys(places):
        file, number = split_place(place)
        by_file[file.rpartition("/")[2]].append(number)
    some = [f"{file}: {', '.join(numbers[:NUMBERS])}" for file, numbers in by_file.items()]
    left = sum(len(numbers[NUMBERS:]) for numbers in by_file.values())
    return "; ".join(some) + (f" and {left:,} more" if left else "")


def _placed(first: str, second: str, is_place: bool = False) -> Iterator[str]:
    """Two texts on one line if they fit; else the second below the first, wrapped unless it is a place."""
    if columns(f"{first} {second}") <= WIDTH:
        yield f"{first} {second}"
    else:
        yield first
        yield from [f"      {second}"] if is_place else _wrapped(second, "      ")


def _wrapped(text: str, first: str = "") -> list[str]:
    """Lines of at most `WIDTH` columns, the first behind ``first``, the others under it."""
    found = list(lines_of(printable(text), WIDTH - columns(first))) or [""]
    return [in_column("" if number else first, columns(first)) + line for number, line in enumerate(found)]
