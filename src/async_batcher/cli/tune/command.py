"""The command ``async-batcher tune``: measure the user's function, and recommend options.

::

    INPUT --> items --> measure: the function alone --> plan --> measure: threads, processes
                                                                              |
    tables and advice, JSON, a plot <-- report <-- model.recommend <----------'

Rules:

- If the function raises, crashes or hangs, the command says so in one line. All of it runs in
  worker processes.
- The time is bounded, except for one item that takes longer than all of it: that is reported.
- More workers are tried as long as the last ones that were added have brought anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

from async_batcher import WorkerPool
from async_batcher.cli._cpu_count import cpu_count
from async_batcher.cli._errors import CommandError, message_of, silenced_logger
from async_batcher.cli._import_string import import_function
from async_batcher.cli._items import STREAM, item_label, open_items, read_error
from async_batcher.cli._signals import run_interruptible
from async_batcher.cli._terminal import ProgressReporter, redirected_stdout
from async_batcher.cli._worker_function import ItemFailure, decode
from async_batcher.cli.tune.alone import MeasuredFunction
from async_batcher.cli.tune.measure import (
    ItemError,
    measure_batcher,
    measure_costs,
    measure_threads,
)
from async_batcher.cli.tune.model import (
    MAX_BATCH_SIZE,
    config_label,
    fit_cost_model,
    median_trials,
    recommend,
    scales,
    spread,
)
from async_batcher.cli.tune.plan import (
    COSTS_SHARE,
    allocate_rounds,
    allocate_time,
    configurations,
    minimum_time,
)
from async_batcher.cli.tune.plot import check_plot, draw
from async_batcher.cli.tune.report import TuneReport, duration
from async_batcher.exceptions import AsyncBatchException

if TYPE_CHECKING:
    from argparse import Namespace

    from async_batcher.cli._import_string import ImportedFunction
    from async_batcher.cli._signals import Interruptible
    from async_batcher.cli.tune.measure import FunctionCosts
    from async_batcher.cli.tune.model import Measurement

_MAX_ITEMS = MAX_BATCH_SIZE  # so that a batch need not hold an item twice
_MAX_BYTES = 64_000_000  # of the input, since all of it is kept
_OVERTIME = 0.25  # of the time: what trials may take beyond it before they are rejected
_TRIAL_TIMEOUT_FACTOR = 4  # times what a trial is planned to take, before it counts as hanging
_TRIAL_TIMEOUT_EXTRA = 10.0  # seconds, for what the plan does not know
_REFRESH_SECONDS = 0.1


def run_command(options: Namespace) -> int:
    """Run ``tune``: measure, and print what was measured and what is recommended."""
    if sys.platform == "win32":
        msg = "tune needs worker processes that can be ended one by one, and Windows has none"
        raise CommandError(msg)
    if options.plot is not None:
        check_plot(options.plot)
    with redirected_stdout():
        report = _tune(options)
    print(json.dumps(report.figures(), indent=2) if options.json else report.text(), flush=True)
    if options.plot is not None:
        try:
            draw(report, options.plot)
        except OSError as exc:
            msg = f"--plot {options.plot!r}: cannot be written: {exc.strerror or exc}"
            raise CommandError(msg, status=1) from exc
    return 0


def _tune(options: Namespace) -> TuneReport:
    began = time.monotonic()
    function = import_function(options.function)
    tuning = _Tuning(options, function, *_read(options), began)
    try:
        with silenced_logger():
            return run_interruptible(tuning.run, options)
    except (AsyncBatchException, ItemError) as exc:
        msg = f"{options.function}: {message_of(exc)}"
        raise CommandError(msg, status=1) from exc


def _read(options: Namespace) -> tuple[list[str], list[Any]]:
    """Read the first items, and how each is named in messages."""
    labels: list[str] = []
    items: list[Any] = []
    size = 0
    try:
        for item in open_items(options.input, options.format):
            labels.append(item_label(item, options.format))
            value = decode(item[1], options.format)
            if isinstance(value, ItemFailure):
                msg = f"{labels[-1]}: {value.error}"
                raise CommandError(msg)
            items.append(value)
            size += len(value if isinstance(value, bytes) else item[1])
            if len(items) == _MAX_ITEMS or size >= _MAX_BYTES:
                break
    except OSError as exc:
        raise read_error(options.input, exc) from exc
    if not items:
        msg = f"there is no item in {_input_name(options)}"
        raise CommandError(msg)
    return labels, items


def _input_name(options: Namespace) -> str:
    return "standard input" if options.input == STREAM else options.input


class _Tuning:
    """The measurements of a run, over ``items`` that are named by ``labels`` in messages."""

    def __init__(
        self,
        options: Namespace,
        function: ImportedFunction,
        labels: list[str],
        items: list[Any],
        began: float,
    ) -> None:
        self._options = options
        self._imported = function
        self._function = MeasuredFunction(function, each=options.each)
        self._labels = labels
        self._items = items
        self._configs = configurations(options.workers or cpu_count())
        self._began = began
        self._doing = "the start of a worker"

    async def run(self, _: Interruptible) -> TuneReport:
        load = _load()
        showing = asyncio.create_task(self._show_progress())
        try:
            alone, trials = await self._measure()
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
        options, points = self._options, [*alone.points, *median_trials(trials)]
        return TuneReport(
            function=self._imported,
            each=options.each,
            source=_input_name(options),
            items=alone.items,
            cores=cpu_count(),
            loop=_loop_name(),
            seconds=time.monotonic() - self._began,
            target_latency=options.target_latency,
            costs=alone.costs,
            model=fit_cost_model(alone.costs),
            points=points,
            spread=spread(trials),
            load=load,
            advice=recommend(points, options.target_latency),
        )

    def _left(self) -> float:
        end: float = self._began + self._options.time
        return max(0.0, end - time.monotonic())

    def _say(self, doing: str) -> None:
        self._doing = doing

    async def _show_progress(self) -> None:
        with contextlib.closing(ProgressReporter()) as reporter:
            while True:
                reporter.status(f"measuring: {self._doing}; {self._left():.0f} s left")
                await asyncio.sleep(_REFRESH_SECONDS)

    async def _measure(self) -> tuple[FunctionCosts, list[Measurement]]:
        """Measure the function by itself, and try all configurations."""
        function, seconds = self._function, self._options.time
        try:
            async with WorkerPool(1) as pool:
                async with asyncio.timeout(self._left()):
                    alone = await measure_costs(
                        function, self._items, self._labels, pool,
                        seconds=COSTS_SHARE * seconds, say=self._say,
                    )  # fmt: skip
                self._check_time(alone)
                return alone, await self._run_trials(alone, pool)
        except TimeoutError as exc:
            stuck = f"stuck at {self._doing}, for longer than {seconds:g} s allow"
            hint = "see whether it hangs, or allow more with --time"
            msg = f"{self._options.function}: {stuck}; {hint}"
            raise CommandError(msg, status=1) from exc

    async def _run_trials(self, alone: FunctionCosts, pool: WorkerPool) -> list[Measurement]:
        """Try every configuration that is worth it, several times if there is time."""
        items, start, configs = self._items[: alone.items], alone.start_seconds, self._configs
        target = self._options.target_latency
        rounds, sizes = allocate_rounds(alone.costs, target, configs, start, self._left())
        points: list[Measurement] = []
        for round_number in range(rounds):
            index = 0
            while index < len(configs):
                mode, workers = configs[index]
                seconds = self._left() / (len(configs) * (rounds - round_number) - index)
                if mode == "processes":
                    seconds -= start
                plan = allocate_time(mode, workers, sizes, alone.costs, seconds)
                self._say(config_label(mode, workers))
                timeout = _TRIAL_TIMEOUT_FACTOR * (plan.seconds + start) + _TRIAL_TIMEOUT_EXTRA
                async with asyncio.timeout(timeout):
                    if mode == "processes":
                        points += await measure_batcher(self._function, items, plan, self._say)
                    else:
                        arguments = self._function, items, plan, _loop_name()
                        points += await pool.run(measure_threads, *arguments)
                index += 1
                if not scales(points, mode, workers):
                    configs = [c for c in configs if c[0] != mode or c[1] <= workers]
        return points

    def _check_time(self, alone: FunctionCosts) -> None:
        """Refuse to guess if there is no time to measure."""
        item, start = alone.costs[0].seconds, alone.start_seconds
        minimum, seconds = minimum_time(item, start, self._configs), self._options.time
        if self._left() + _OVERTIME * seconds < minimum:
            takes = f"an item takes {duration(item)}, and a worker {duration(start)} to start"
            enough = math.ceil(1.2 * (seconds - self._left() + minimum))
            too_long = f"too long to compare anything within {seconds:g} s; allow --time {enough}"
            msg = f"{self._options.function}: {takes}: {too_long}"
            raise CommandError(msg, status=1)


def _loop_name() -> Literal["asyncio", "uvloop"]:
    is_uvloop = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
    return "uvloop" if is_uvloop else "asyncio"


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:  # unknown
        return 0.0
