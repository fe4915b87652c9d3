"""Owns which process of a run this one is, and what the processes agree on: outcomes, figures, who goes first.

With one process, each function gives back what it was given, and torch.distributed is not imported. Knows neither
weights nor files. What is agreed on goes over the host, beside the gradients: no device is waited for.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from threading import Thread
from traceback import walk_tb
from typing import Any, NamedTuple, TypeVar

from lit_qlora.errors import UserError, one_line
from lit_qlora.place import COMMAND

T = TypeVar("T")

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""torchrun's names in the environment of one of several processes, in the order of `World`."""
STORE = "LIT_QLORA_STORE"
"""Environment variable of processes that this project started: the file through which they find each other."""
LONGEST_WAIT = timedelta(days=1)
"""Longest wait for a process, such as during a download; one that ends is noticed at once."""
DEAD = timedelta(minutes=10)
"""Longest time of a device for its part of a step."""
LONG = timedelta(seconds=30)
"""Wait for other processes after which it is reported: as a rule, they start within seconds of each other."""
REPLY = timedelta(seconds=5)
"""Longest time in which a running program answers."""


class World(NamedTuple):
    """The place of this process among all processes, and among those on this machine.

    Args:
        rank: number of this process among all.
        size: number of processes.
        local_rank: its number on this machine.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


class LostError(UserError):
    """An error for another process of the run that has ended, or does not answer."""


class AllEnd(SystemExit):
    """An exit that every process of the run takes, so that each waits for the others before it ends."""


def world() -> World:
    """This process, by the environment, as torchrun and `starting` leave it; alone where that says less.

    A script's Trainer is alone, whatever WORLD_SIZE a cluster has left.
    """
    places = [os.environ.get(name, "") for name in OF_TORCHRUN]
    if not all(map(str.isdecimal, places)):
        return World()
    here = World(*map(int, places))
    return here if here.size > 1 else World()


def is_first() -> bool:
    """True in the process that alone prints and writes; with one process always."""
    return world().rank == 0


_host_group: list[Any] = []
"""The group for what goes over the host, once the processes have joined."""
_store: list[Any] = []
"""The store in which processes find each other, once it is open."""


def master() -> tuple[str, int]:
    """Host and port of the store by which processes find each other, kept by the first process or by torchrun.

    Raises UserError where the environment does not say it.
    """
    host, port = (os.environ.get(name, "").strip() for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise half_of("WORLD_SIZE", "MASTER_PORT" if host else "MASTER_ADDR")
    return host, int(port)


def half_of(count: str, other: str, by: str = "torchrun") -> UserError:
    """The error for one half of what a launcher leaves in the environment.

    Args:
        count: the variable with the number of processes.
        other: the one that is missing, or can't be.
        by: the launcher.
    """
    value = os.environ.get(other, "").strip()
    return UserError(
        f"{count}={os.environ.get(count, '').strip()} in the environment, and "
        f"{f'{other}={value}' if value else f'no {other}'}",
        remedy=f"start with {by}, or unset {count} and start {COMMAND} by itself",
    )


def board(limit: timedelta) -> Any:
    """A key-value store of torch's, in which each process can leave messages for all, whether or not they have joined.

    It may take until ``limit`` to reach it. Raises UserError if it can't be reached, or the environment does not say
    where it is.
    """
    from torch import distributed

    if not _store:
        is_file = STORE in os.environ
        _store.append(distributed.FileStore(os.environ[STORE], world().size) if is_file else _open_store(limit))
    return distributed.PrefixStore("lit_qlora", _store[0])


def _open_store(limit: timedelta) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, kept there by the first process or by torchrun.

    Nobody is waited for inside of torch, where signals would not be heard.
    """
    from torch import distributed

    (host, port), here = master(), world()
    keeps = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        _reach(host, port, limit)
    found: list[Any] = []

    def open_it() -> None:
        try:
            store = distributed.TCPStore(
                host, port, here.size, keeps, REPLY, wait_for_workers=False, multi_tenant=True,
                use_libuv=os.name != "nt",
            )  # fmt: skip
        except distributed.DistError as error:
            found.append(error)
        else:
            found.append(store)

    # In a thread: where another program answers at the port, torch would wait for ever.
    Thread(target=open_it, daemon=True).start()
    ends_at = time.monotonic() + 2 * REPLY.total_seconds()
    while not found and time.monotonic() < ends_at:
        time.sleep(0.01)
    if not found or isinstance(found[0], distributed.DistError):
        raise UserError(
            f"MASTER_PORT={port} can't be opened at {host}: another program may have it",
            remedy="set MASTER_PORT to a port that is free there",
        ) from (found or [None])[0]
    found[0].set_timeout(DEAD)
    return found[0]


def _reach(host: str, port: int, limit: timedelta) -> None:
    """Return once a program answers at ``port``. Raises UserError if none has within ``limit``."""
    for is_over, is_long in _looks(limit):
        try:
            socket.create_connection((host, port), timeout=REPLY.total_seconds()).close()
            return
        except OSError as error:
            if is_over:
                raise _not_come([0], f"to {host}:{port} ", limit, f" ({error.strerror or error})") from error
            if is_long:
                _report_wait([0], f"at {host}:{port}, ", limit)


def _meet() -> None:
    """Return once every process has come here.

    Raises:
        LostError: one has failed on the way.
        UserError: one does not come.
    """
    found, here = board(DEAD), world()
    found.set(f"came {here.rank}", "")
    found.add("came", 1)
    for is_over, is_long in _looks(DEAD):
        if found.add("came", 0) >= here.size:
            return
        if found.check(["failed"]):
            raise lost()
        if is_over or is_long:
            missing = [rank for rank in range(here.size) if not found.check([f"came {rank}"])]
            if is_over:
                raise _not_come(missing, "", DEAD)
            _report_wait(missing, "", DEAD)


def _looks(limit: timedelta) -> Iterator[tuple[bool, bool]]:
    """Yield at each poll of the other processes: whether ``limit`` is over, and, once, whether the wait is `LONG`."""
    began, is_reported = time.monotonic(), False
    while True:
        waited_s = time.monotonic() - began
        is_long = waited_s >= LONG.total_seconds() and not is_reported
        is_reported |= is_long
        yield waited_s > limit.total_seconds(), is_long
        time.sleep(0.05)


def _report_wait(ranks: list[int], where: str, limit: timedelta) -> None:
    """Print whom the others wait for, by the first of these.

    Whatever is silenced: the first process of all may not be there to speak.
    """
    if ranks and world().rank == min({*range(world().size)} - {*ranks}):
        print(f"   run  waits for {_named(ranks)}, {where}at most {limit.total_seconds():.0f} s", file=sys.__stderr__)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + ", …" * (len(ranks) > 8)
    return f"process{'es' * (len(ranks) > 1)} {shown} of {world().size}"


def _not_come(ranks: list[int], where: str, limit: timedelta, why: str = "") -> UserError:
    return UserError(
        f"{_named(ranks)} did not come {where}within {limit.total_seconds():.0f} s{why}",
        remedy="the command must start on every machine, and reach MASTER_ADDR there",
    )


def join(gpu: int | None) -> None:
    """Meet the other processes, each on its device; nothing with one process, or where they have met.

    Args:
        gpu: number of this process's; None on a CPU.

    Raises:
        LostError: one has failed on the way.
        UserError: one does not come.
    """
    here = world()
    if here.size == 1 or _host_group:
        return
    import torch
    from torch import distributed

    if here.local_size == here.size and sys.platform == "linux":  # no name of this machine has to be resolved
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _meet()
    store = distributed.PrefixStore("group", _store[0])
    options: dict[str, Any] = {"store": store, "timeout": DEAD, "rank": here.rank, "world_size": here.size}
    with peers():
        if gpu is None:
            distributed.init_process_group("gloo", **options)
        else:
            torch.cuda.set_device(gpu)
            distributed.init_process_group("nccl", device_id=torch.device("cuda", gpu), **options)
        _host_group.append(distributed.new_group(backend="gloo", timeout=LONGEST_WAIT))
    barrier()  # one that is through may end, and would be lost to those that still connect


def _group() -> Any:
    """The processes that `join` made acquainted. Raises UserError in a script, which calls no `join`."""
    if not _host_group:
        raise UserError(
            f"WORLD_SIZE={world().size} in the environment: several processes were started, and a script is for one",
            remedy=f"start it by itself; {COMMAND} fit trains on several devices",
        )
    return _host_group[0]


def leave() -> None:
    """Leave the other processes."""
    if _host_group:
        from torch import distributed

        _host_group.clear()
        distributed.destroy_process_group()
        _store.clear()


def hang_up() -> None:
    """Let the other processes notice at their next agreement that this one has ended."""
    if _host_group:
        from torch import distributed

        distributed.destroy_process_group(_host_group.pop())


@contextmanager
def silent_unless_first() -> Iterator[None]:
    """Let only the first process print inside the context. The caller reports an error that leaves it."""
    if is_first():
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


@contextmanager
def peers() -> Iterator[None]:
    """A context for what all processes take part in. Raises LostError if one does not."""
    try:
        yield
    except RuntimeError as error:
        if world().size == 1 or not _is_lost(error):
            raise
        raise lost(error) from error


def lost(error: RuntimeError | None = None) -> LostError:
    """The error of a process that has lost another; ``error`` is torch's, by which it knows."""
    return LostError(
        f"another process of the run has ended, or did not answer{f' ({one_line(error)})' if error else ''}",
        remedy="its own last line says why; the same command resumes from the last checkpoint",
    )


def _is_lost(error: RuntimeError) -> bool:
    """True for torch's error that another process is gone.

    gloo's have no class of their own: they are known by where they are raised, in torch.distributed or by a call into
    torch right inside of `peers`.
    """
    from torch import distributed

    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    is_inside = len(frames) == 2 or frames[-1].f_globals.get("__name__", "").startswith("torch.distributed.")
    return isinstance(error, distributed.DistError) or (type(error) is RuntimeError and is_inside)


def barrier() -> None:
    """Return once every process has come here."""
    if world().size > 1:
        highest(0)


_notes: list[str] = []
"""Lines of this process that the first one is to print."""


def note_at_agreement(line: str) -> None:
    """Print ``line``: with several processes the first does, with the number of this one, at the next agreement."""
    here = world()
    if here.size == 1:
        print(line, flush=True)
    else:
        _notes.append(f"process {here.rank} of {here.size}: {line}")


def highest(*values: float) -> list[float]:
    """The highest of all processes, for each of ``values``; and what one has noted is printed."""
    if world().size == 1:
        return [*values]
    *found, has_notes = _reduced([*values, bool(_notes)], "MAX")
    if has_notes:
        said = gathered([*_notes])
        _notes.clear()
        if is_first():
            print(*(line for lines in said for line in lines), sep="\n", flush=True)
    return found


def lowest(value: int) -> int:
    """The lowest ``value`` of all processes."""
    return -int(highest(-value)[0])


def any_of(flag: bool) -> bool:
    """True if ``flag`` is in any process."""
    return bool(highest(flag)[0])


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sum over all processes, for each of ``values``."""
    return dict(zip(values, _reduced([*values.values()], "SUM"), strict=True))


def _reduced(values: Any, how: str) -> list[float]:
    if world().size == 1:
        return [*values]
    import torch
    from torch import distributed

    found = torch.tensor([*values], dtype=torch.float64)
    with peers():
        work = distributed.all_reduce(found, getattr(distributed.ReduceOp, how), group=_group(), async_op=True)
        pause_s = 2e-5
        while not work.is_completed():  # torch's own wait lets no signal through, and another may be long in coming
            time.sleep(pause_s)
            pause_s = min(1.2 * pause_s, 2e-3)
        work.wait()
    return found.tolist()  # type: ignore[no-any-return]


def gathered(value: T) -> list[T]:
    """The ``value`` of each process, in their order."""
    if world().size == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * world().size
    _reduced([0], "MAX")  # waits for the others as objects' own calls can't: so that signals are heard
    with peers():
        distributed.all_gather_object(found, value, group=_group())
    return found


def from_first(value: T) -> T:
    """The ``value`` of the first process."""
    if world().size == 1:
        return value
    from torch import distributed

    box = [value]
    _reduced([0], "MAX")  # waits for the others as objects' own calls can't: so that signals are heard
    with peers():
        distributed.broadcast_object_list(box, 0, group=_group())
    return box[0]


def by_first(do: Callable[[], T]) -> T:
    """The result of ``do`` in the first process, which alone runs it.

    Raises what it raised there: an OSError in the others too, in whose place they would continue alone; for all else,
    which the first process reports, SystemExit.
    """
    if world().size == 1:
        return do()
    if not is_first():
        value, ends = from_first((None, None))
        if ends is not None:
            raise ends
        return value  # type: ignore[return-value]
    try:
        value = do()
    except BaseException as error:
        from_first((None, _for_others(error)))
        raise
    return from_first((value, None))[0]


def _for_others(error: BaseException) -> BaseException:
    if isinstance(error, OSError):
        return OSError(error.errno or 0, str(error))
    return AllEnd(error.code if isinstance(error, SystemExit) else 2 if isinstance(error, UserError) else 1)


@contextmanager
def local_first() -> Iterator[None]:
    """Run what is inside in the first process of each machine, then in the others, who find what it left on disk."""
    here = world()
    if here.local_rank:
        barrier()
    yield
    if not here.local_rank:
        barrier()


def check_same(what: Mapping[str, Any]) -> None:
    """Raises UserError, in every process, where ``what`` differs between processes, by names."""
    if world().size == 1:
        return
    of_all = gathered((socket.gethostname(), dict(what)))
    first = of_all[0][1]
    for rank, (host, found) in enumerate(of_all):
        changes = [
            f"{name} {first.get(name)!r} -> {found.get(name)!r}"
            for name in sorted({*first, *found})
            if first.get(name) != found.get(name)
        ]
        if changes:
            raise UserError(
                f"process {rank} on {host} differs from the first: {'; '.join(changes[:4])}",
                option="run",
                remedy="start all with the same command, data and versions",
            )
