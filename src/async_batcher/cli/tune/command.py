"""The command ``async-batcher tune``: measure the user's function, and recommend options.

::

    INPUT --> items --> measure: the function alone --> plan --> search --Trial--> measure
                                                                   |  ^              |
    tables and advice, JSON, a plot <-- report <-- Search.choice --'  '-Measurement--'

Rules:

- If the function raises, crashes or hangs, the command says so in one line. All of it runs in
  worker processes.
- The time is bounded, except for one item that takes longer than all of it: that is reported.
- Worker processes are started before the search begins, so that their start takes no time of it.
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
from async_batcher._batching.records.batch_cost import fit_cost_model
from async_batcher._serialization.exception_text import duration
from async_batcher.cli._cpu_count import cpu_count
from async_batcher.cli._errors import CommandError, message_of, silenced_logger
from async_batcher.cli._import_string import import_function
from async_batcher.cli._items import STREAM, item_label, open_items, read_error
from async_batcher.cli._signals import run_interruptible
from async_batcher.cli._terminal import ProgressReporter, redirected_stdout
from async_batcher.cli._worker_function import ItemFailure, decode
from async_batcher.cli.tune.alone import MeasuredFunction
from async_batcher.cli.tune.measure import ItemError, TrialBatchers, measure_costs
from async_batcher.cli.tune.model import MAX_BATCH_SIZE, pool_label
from async_batcher.cli.tune.plan import COSTS_SHARE, make_plan, minimum_time
from async_batcher.cli.tune.plot import check_plot, draw
from async_batcher.cli.tune.report import TuneReport
from async_batcher.cli.tune.search import Search
from async_batcher.exceptions import AsyncBatchException

if TYPE_CHECKING:
    from argparse import Namespace

    from async_batcher.cli._import_string import ImportedFunction
    from async_batcher.cli._signals import Interruptible
    from async_batcher.cli.tune.measure import FunctionCosts
    from async_batcher.cli.tune.plan import Plan

_MAX_ITEMS = MAX_BATCH_SIZE  # so that a batch need not hold an item twice
_MAX_BYTES = 64_000_000  # of the input, since all of it is kept
# A trial or a start that takes longer than so many times what is planned, and some seconds more,
# counts as hanging.
_TRIAL_TIMEOUT_FACTOR = 4
_OVERTIME = 20.0
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
        self._max_workers = options.workers or cpu_count()
        self._began = began
        self._doing = "the start of a worker"

    async def run(self, _: Interruptible) -> TuneReport:
        load = _load()
        showing = asyncio.create_task(self._show_progress())
        try:
            alone, plan, search = await self._measure()
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
        options = self._options
        return TuneReport(
            function=self._imported,
            each=options.each,
            source=_input_name(options),
            items=alone.items,
            cores=cpu_count(),
            loop=_loop_name(),
            seconds=time.monotonic() - self._began,
            start_seconds=alone.start_seconds,
            target_latency=options.target_latency,
            costs=alone.costs,
            model=fit_cost_model(alone.costs),
            plan=plan,
            clients=options.clients,
            points=search.points(),
            ratios=search.ratios(),
            windows=search.windows(),
            load=load,
            choice=search.choice(),
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

    async def _measure(self) -> tuple[FunctionCosts, Plan, Search]:
        """Measure the function by itself, and search for the best options."""
        function, seconds = self._function, self._options.time
        try:
            async with WorkerPool(1) as pool:
                async with asyncio.timeout(self._left()):
                    alone = await measure_costs(
                        function, self._items, self._labels, pool,
                        seconds=COSTS_SHARE * seconds, say=self._say,
                    )  # fmt: skip
                self._check_time(alone)
                items = self._items[: alone.items]
                async with TrialBatchers(function, items, pool, _loop_name()) as batchers:
                    return alone, *await self._search(alone, batchers)
        except TimeoutError as exc:
            stuck = f"stuck at {self._doing}, for longer than {seconds:g} s allow"
            hint = "see whether it hangs, or allow more with --time"
            msg = f"{self._options.function}: {stuck}; {hint}"
            raise CommandError(msg, status=1) from exc

    async def _search(self, alone: FunctionCosts, batchers: TrialBatchers) -> tuple[Plan, Search]:
        options, workers, start = self._options, self._max_workers, alone.start_seconds
        limits = options.clients, start, self._left(), options.target_latency
        plan = make_plan(alone.costs, workers, *limits)
        for mode, count in plan.pools:
            if mode == "processes":
                await self._start(batchers, count, start)
        search = Search(alone.costs, plan, options.clients, workers, options.target_latency)
        # At least one trial: the start of workers may have taken all that was left.
        trials = search.run(max(self._left(), minimum_time(alone.costs)))
        trial = next(trials, None)
        while trial is not None:
            config = trial.config
            if not batchers.has_started(config):
                await self._start(batchers, config.workers, start)
            self._say(f"{pool_label(*config.pool)}, batches of up to {config.batch_size:,}")
            async with asyncio.timeout(_TRIAL_TIMEOUT_FACTOR * trial.seconds + _OVERTIME):
                measurement = await batchers.measure(trial)
            try:
                trial = trials.send((measurement, self._left()))
            except StopIteration:
                trial = None
        return plan, search

    async def _start(self, batchers: TrialBatchers, workers: int, seconds: float) -> None:
        self._say(f"the start of {pool_label('processes', workers)}")
        # Many workers that start at the same time share the cores.
        timeout = max(_TRIAL_TIMEOUT_FACTOR * workers * seconds, self._left()) + _OVERTIME
        async with asyncio.timeout(timeout):
            await batchers.start(workers)

    def _check_time(self, alone: FunctionCosts) -> None:
        """Refuse to guess if there is no time to measure."""
        item, start = alone.costs[0].seconds, alone.start_seconds
        minimum, seconds = minimum_time(alone.costs), self._options.time
        if self._left() < minimum:
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
