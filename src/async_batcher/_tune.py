"""The command ``tune``: the user's function on the user's items, measured; the options that suit it.

::

    INPUT --> items --> _trials: costs, in one worker --> _plan --> _trials: inline, in threads, in processes, several times
                                                                        |
    the table and the advice, JSON, a plot <-- _advice.Tuning <-- _tuning.advise

Rules:

- Whatever the function does (raise, crash, hang), the command says so in one line and ends; all of it runs in worker processes.
- The time is bounded, but for one item that takes longer than all of it: that is ended, and said.
- More workers are tried for as long as the last ones that were added have brought anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from async_batcher._advice import Named, Tuning, duration
from async_batcher._formats import Failure, InputError, close, decode, open_input, place, unreadable
from async_batcher._frontier import check_plot, draw
from async_batcher._interrupts import Interrupts, ignored_signals, start_fork_server
from async_batcher._plan import COSTS_SHARE, least_seconds, make_plan, share_out, ways_to_try
from async_batcher._pool.cpu_count import cpu_count
from async_batcher._pool.pool import WorkerPool
from async_batcher._target import TargetError, load_target
from async_batcher._timed import Called
from async_batcher._trials import ItemError, measure_costs, quiet, try_in_worker, try_out
from async_batcher._tuning import MAX_BATCH_SIZE, advise, fit, pays, spread, typical, way
from async_batcher.batcher import AsyncBatcher
from async_batcher.exceptions import AsyncBatchException
from async_batcher.loops import loop_factory, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from async_batcher._formats import Format
    from async_batcher._target import Target
    from async_batcher._trials import Costs
    from async_batcher._tuning import Point

_STREAM = "-"
_MOST_ITEMS = MAX_BATCH_SIZE  # so that a batch need not hold an item twice
_MOST_BYTES = 64_000_000  # of the input, since all of it is kept
_OVERTIME = 0.25  # of the time: by so much more it may take before it is refused
_PATIENCE = 4  # times what a trial is planned to take, before it is said to hang
_MORE_PATIENCE = 10.0  # seconds, for what has nothing to do with its plan
_DRAW_SECONDS = 0.1  # between two drawings


class TuneError(Exception):
    """It cannot be done, or the function failed; the message is one line for the user.

    Attributes:
        status: The exit status of the command.
    """

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


class Settings(NamedTuple):
    """What the user asks for.

    Attributes:
        function: ``module:function`` or ``file.py:function``.
        input: A file, a directory, or ``-``: standard input.
        format: What an item of it is.
        each: Whether the function takes one item, not a list of them.
        workers: Threads and processes to try at most.
        time: Seconds that it may take.
        target_latency: Seconds that an item may take; None: throughput is the target.
        plot: A file to draw the frontier into.
        loop: As for `async_batcher.run`.
        json: Whether to print one JSON object instead of text.
    """

    function: str
    input: str
    format: Format
    each: bool
    workers: int
    time: float
    target_latency: float | None
    plot: str | None
    loop: Literal["auto", "asyncio", "uvloop"]
    json: bool


def tune(settings: Settings) -> None:
    """Measure, and print what was measured and what is recommended.

    Raises:
        TuneError: The function, the input or the plot cannot be used, the function failed, or a signal came.
        OSError: Standard output cannot be written.
        KeyboardInterrupt: Ctrl-C before anything was begun.
    """
    _check(settings)
    with _kept_stdout():
        tuning = _tuned(settings)
    print(json.dumps(tuning.figures(), indent=2) if settings.json else tuning.text(), flush=True)
    if settings.plot is not None:
        try:
            draw(tuning, settings.plot)
        except OSError as exc:
            msg = f"--plot {settings.plot!r}: cannot be written: {exc.strerror or exc}"
            raise TuneError(msg, status=1) from exc


@contextlib.contextmanager
def _kept_stdout() -> Iterator[None]:
    """Keep standard output for the result: what the function prints meanwhile, in a worker too, goes to standard error."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # one of the two is closed
            mine = os.dup(1)
            stack.callback(os.close, mine)
            os.dup2(2, 1)
            stack.callback(os.dup2, mine, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # or what is buffered comes later
        yield


def _tuned(settings: Settings) -> Tuning:
    began = time.monotonic()
    ignored = ignored_signals()  # before any code of the user's may change that
    try:
        target = load_target(settings.function)
        places, items = _read(settings)
    except (TargetError, InputError) as exc:
        raise TuneError(str(exc)) from exc
    progress = _Progress(began + settings.time)
    try:
        return run(_tune(settings, target, places, items, progress, began, ignored), loop=settings.loop)
    except AsyncBatchException as exc:
        msg = f"{settings.function}: {exc}"
        raise TuneError(msg, status=1) from exc
    finally:
        progress.close()


def _check(settings: Settings) -> None:
    """Refuse what will not do, before anything is measured."""
    if sys.platform == "win32":
        msg = "tune needs worker processes that can be ended one by one, and Windows has none"
        raise TuneError(msg)
    try:
        loop_factory(settings.loop)
        if settings.plot is not None:
            check_plot(settings.plot)
    except (ValueError, ImportError) as exc:
        raise TuneError(str(exc)) from exc


def _read(settings: Settings) -> tuple[list[str], list[Any]]:
    """The first items, and how each is called in messages.

    Raises:
        InputError: There is none, or one cannot be read.
    """
    places: list[str] = []
    items: list[Any] = []
    size = 0
    try:
        source = open_input(None if settings.input == _STREAM else settings.input, settings.format)
        with contextlib.ExitStack() as stack:
            stack.callback(close, source)
            for number, raw in source:
                places.append(place(number, raw, settings.format))
                item = decode(raw, settings.format)
                if isinstance(item, Failure):
                    msg = f"{places[-1]}: {item.error}"
                    raise InputError(msg)
                items.append(item)
                size += len(item if isinstance(item, bytes) else raw)
                if len(items) == _MOST_ITEMS or size >= _MOST_BYTES:
                    break
    except OSError as exc:
        raise InputError(unreadable(settings.input, exc)) from exc
    if not items:
        msg = f"there is no item in {_name_of(settings.input)}"
        raise InputError(msg)
    return places, items


def _name_of(source: str) -> str:
    return "standard input" if source == _STREAM else source


async def _tune(
    settings: Settings,
    target: Target,
    places: list[str],
    items: list[Any],
    progress: _Progress,
    began: float,
    ignored: frozenset[int],
) -> Tuning:
    module = type(asyncio.get_running_loop()).__module__
    loop: Literal["asyncio", "uvloop"] = "uvloop" if module.startswith("uvloop") else "asyncio"
    called = Called(target, each=settings.each)
    load = _load()
    with Interrupts(ignored) as interrupts, quiet():
        try:
            await asyncio.to_thread(start_fork_server)
            async with progress.shown():
                costs, trials = await _measure(settings, called, places, items, progress, loop)
        except asyncio.CancelledError as exc:
            if interrupts.number is None:
                raise
            msg = "interrupted"
            raise TuneError(msg, status=128 + interrupts.number) from exc
    points = typical(trials)
    return Tuning(
        name=settings.function,
        named=_named(target),
        each=settings.each,
        source=_name_of(settings.input),
        items=costs.items,
        cores=cpu_count(),
        loop=loop,
        seconds=time.monotonic() - began,
        target_latency=settings.target_latency,
        costs=costs.costs,
        line=fit(costs.costs),
        points=points,
        spread=spread(trials),
        load=load,
        advice=advise(points, settings.target_latency),
    )


async def _measure(
    settings: Settings,
    called: Called,
    places: list[str],
    items: list[Any],
    progress: _Progress,
    loop: Literal["asyncio", "uvloop"],
) -> tuple[Costs, list[Point]]:
    """What the function takes by itself, and what came of each trial."""
    try:
        async with WorkerPool(1) as pool:
            async with asyncio.timeout(progress.left()):
                seconds = COSTS_SHARE * settings.time
                costs = await measure_costs(called, items, places, pool, seconds=seconds, say=progress.say)
            tried = await _try_all(settings, called, items[: costs.items], costs, pool, progress, loop)
    except ItemError as exc:
        where = exc.place or f"a batch of {exc.size:,} items failed, though each of them had passed alone"
        msg = f"{settings.function}: {where}: {exc}"
        raise TuneError(msg, status=1) from exc
    except TimeoutError as exc:
        msg = (
            f"{settings.function}: stuck at {progress.doing}, for longer than {settings.time:g} s allow; "
            "see whether it hangs, or allow more with --time"
        )
        raise TuneError(msg, status=1) from exc
    return costs, tried


async def _try_all(
    settings: Settings,
    called: Called,
    items: list[Any],
    costs: Costs,
    pool: WorkerPool,
    progress: _Progress,
    loop: Literal["asyncio", "uvloop"],
) -> list[Point]:
    """Try every way to run batches that is worth it, several times if there is time."""
    ways = ways_to_try(settings.workers)
    _check_time(settings, costs, progress.left())
    rounds, sizes = share_out(costs.costs, settings.target_latency, ways, costs.start_seconds, progress.left())
    points: list[Point] = []
    for done in range(rounds):
        place = 0
        while place < len(ways):
            mode, workers = ways[place]
            seconds = progress.left() / (len(ways) * (rounds - done) - place)
            if mode == "processes":
                seconds -= costs.start_seconds
            plan = make_plan(mode, workers, sizes, costs.costs, seconds)
            progress.say(way(mode, workers))
            async with asyncio.timeout(_PATIENCE * (plan.seconds + costs.start_seconds) + _MORE_PATIENCE):
                if mode == "processes":
                    points += await try_out(called, items, plan, progress.say)
                else:
                    points += await try_in_worker(called, items, plan, pool, loop)
            place += 1
            if not pays(points, mode, workers):
                ways = [other for other in ways if other[0] != mode or other[1] <= workers]
    return points


def _check_time(settings: Settings, costs: Costs, left: float) -> None:
    """Refuse to guess where there is no time to measure."""
    alone, start = costs.costs[0].seconds, costs.start_seconds
    least = least_seconds(alone, start, ways_to_try(settings.workers))
    if left + _OVERTIME * settings.time < least:
        enough = math.ceil(1.2 * (settings.time - left + least))
        msg = (
            f"{settings.function}: an item takes {duration(alone)}, and a worker {duration(start)} to start: "
            f"too long to compare anything within {settings.time:g} s; allow --time {enough}"
        )
        raise TuneError(msg, status=1)


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:  # the system does not say
        return 0.0


def _named(target: Target) -> Named:
    path = target.name.rpartition(":")[2]
    found: Any = functools.reduce(getattr, path.split("."), sys.modules[target.module])
    return Named(target.module, path, is_batcher=isinstance(found, AsyncBatcher), has_setup=target.setup is not None)


class _Progress:
    """One line on a terminal that says what is measured, and how many seconds are left; and what knows both.

    Args:
        deadline: On `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._is_shown = sys.stderr is not None and sys.stderr.isatty()
        self._drawn = -math.inf
        self.doing = "the start of a worker"

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    def say(self, doing: str) -> None:
        """That is measured next."""
        self.doing = doing
        if self._is_shown and time.monotonic() - self._drawn >= _DRAW_SECONDS:
            self._draw()

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Keep the line up to date meanwhile."""
        drawing = asyncio.create_task(self._keep_drawing()) if self._is_shown else None
        try:
            yield
        finally:
            if drawing is not None:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)

    def close(self) -> None:
        """Leave an empty line."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    async def _keep_drawing(self) -> None:
        while True:
            self._draw()
            await asyncio.sleep(_DRAW_SECONDS)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        columns = shutil.get_terminal_size().columns
        line = f"measuring: {self.doing}; {self.left():.0f} s left"[: columns - 1]
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
