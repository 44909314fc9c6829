"""What ``tune`` shows: figures, tables, the advice in words, and the code to paste (pure)."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher._serialization.exception_text import duration
from async_batcher.cli._terminal import table
from async_batcher.cli.tune.model import pool_label
from async_batcher.cli.tune.reasons import best_of_pools, explain
from async_batcher.cli.tune.search import BUSY_SPREAD
from async_batcher.cli.tune.words import counted, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from async_batcher._batching.records.batch_cost import BatchCost, CostModel
    from async_batcher.cli._import_string import ImportedFunction
    from async_batcher.cli.tune.model import Choice, Config, Measurement
    from async_batcher.cli.tune.plan import Plan

_BUSY_LOAD = 0.5  # of the cores; below that, what is measured has nearly all of them

_OUR_NAMES = ("batched", "batcher", "process_batch")  # in the code to paste


class TuneReport(NamedTuple):
    """All that was measured, and what follows."""

    function: ImportedFunction
    each: bool  # whether it takes one item
    source: str  # the input
    items: int  # of it that were used
    cores: int
    loop: str
    seconds: float  # that it all took
    start_seconds: float  # of a worker process
    target_latency: float | None  # None: throughput is the target
    costs: Sequence[BatchCost]  # of the function alone
    model: CostModel
    plan: Plan
    clients: Sequence[int]  # the numbers that were asked for
    points: Mapping[Config, Measurement]  # with the number of clients that decides
    ratios: Mapping[Config, float]  # of their throughput to that of the choice
    windows: Mapping[Config, Mapping[int, Measurement]]  # by number of clients
    load: float  # average, at the beginning
    choice: Choice

    def figures(self) -> dict[str, Any]:
        """All numbers, with their units in their names."""
        choice, model = self.choice, self.model
        config = choice.config
        return {
            "function": self.function.name,
            "input": self.source,
            "items": self.items,
            "python": platform.python_version(),
            "loop": self.loop,
            "cores": self.cores,
            "seconds": self.seconds,
            "worker_start_seconds": self.start_seconds,
            "target_latency_seconds": self.target_latency,
            "costs": [cost._asdict() for cost in self.costs],
            "fit": {
                "fixed_seconds": model.fixed,
                "seconds_per_item": model.per_item,
                "largest_error_percent": 100 * model.error,
                "holds": model.holds,
            },
            "spread_percent": 100 * choice.spread,
            "load_at_start": self.load,
            "is_busy": bool(self.warnings()),
            "clients": list(self.clients),
            "deciding_clients": choice.clients,
            "points": [
                _figures(config, choice.clients, found) for config, found in self.points.items()
            ],
            "windows": [
                _figures(one, clients, found)
                for one, loads in self.windows.items()
                for clients, found in loads.items()
            ],
            "advice": {
                "meets_target": choice.meets_target,
                "executor": config.executor,
                "max_workers": config.workers if config.executor else None,
                "max_batch_size": config.batch_size,
                "max_queue_time": config.queue_time,
                "loads": [
                    _figures(config, clients, found) for clients, found in choice.loads.items()
                ],
                "why": self.reasons(),
                "warnings": self.warnings(),
                "code": self.code(),
            },
        }

    def text(self) -> str:
        """The tables, what a batch costs, the advice, and the code, in 80 columns."""
        where = f"Python {platform.python_version()}, {self.loop}, {counted(self.cores, 'core')}"
        items = "the first item" if self.items == 1 else f"the first {self.items:,} items"
        target = "throughput"
        if self.target_latency is not None:
            target = f"a p99 within {duration(self.target_latency)}"
        deciding = counted(self.choice.clients, "client")
        options = self._options()
        if not self.choice.config.executor:
            options.insert(0, "no executor (1 thread)")
        warnings = [line for text in self.warnings() for line in wrapped(text)]
        return "\n".join(
            [
                *wrapped(f"{self.function.name} on {items} of {self.source}"),
                f"{where}; measured for {self.seconds:.0f} s",
                "",
                *wrapped(self._costs()),
                "",
                *self._pools(),
                "",
                f"Recommended for {target} with {deciding}:",
                *wrapped(", ".join(options), "  "),
                *warnings,
                "",
                *self._loads(),
                "",
                *(line for reason in self.reasons() for line in wrapped(f"- {reason}", "  ")),
                "",
                self.code().rstrip(),
            ]
        )

    def warnings(self) -> list[str]:
        """Say why the figures are not to be relied on."""
        signs = []
        if self.choice.spread > BUSY_SPREAD:
            signs.append(f"rounds of the same options differ by {100 * self.choice.spread:.0f} %")
        if self.load > _BUSY_LOAD * self.cores:
            cores = counted(self.cores, "core")
            signs.append(f"the load was {self.load:.1f} on {cores} when this began")
        found = []
        if signs:
            found.append(
                f"The machine is busy: {', and '.join(signs)}. Other options may be as good. Run "
                "this again when the machine is idle."
            )
        if not self.choice.meets_target:
            most = duration(self.target_latency or 0.0)
            found.append(f"No options keep p99 within {most}; these come nearest.")
        return found

    def reasons(self) -> list[str]:
        """Say why the options were chosen, each in a sentence or two."""
        return explain(self)

    def code(self) -> str:
        """A module that makes the batcher."""
        module, name = self.function.module, self.function.path
        first, _, _ = name.partition(".")
        head = f"from {module} import {first}"
        if first in _OUR_NAMES:
            head, name = f"import {module}", f"{module}.{name}"
        setup = [f"setup_worker={name}.setup_worker"] if self.function.setup else []
        if self.function.is_batcher:
            name = f"{name}.process_batch"
        imports = ["from async_batcher import batched", head]
        lines = [*sorted(imports, key=lambda line: line.split()[1]), ""]
        if self.each:
            body = f"    return [{name}(item) for item in batch]"
            lines += ["", "def process_batch(batch):", body, "", ""]
            name = "process_batch"
        options = [f"    {option}," for option in (name, *setup, *self._options())]
        call = "# in each task: result = await batcher(item)"
        return "\n".join([*lines, "batcher = batched(", *options, ")", "", call, ""])

    def _options(self) -> list[str]:
        config = self.choice.config
        where = [f'executor="{config.executor}"', f"max_workers={config.workers}"]
        return [
            *(where if config.executor else []),
            f"max_batch_size={config.batch_size}",
            f"max_queue_time={config.queue_time:g}",
        ]

    def _pools(self) -> list[str]:
        """A row for each pool, with its best batch size.

        Rounds are interleaved, so the ratios of the rounds are more reliable than the throughputs,
        which are those of the chosen options times the ratios.
        """
        chosen = self.points[self.choice.config._replace(queue_time=0.0)].throughput
        rows = [
            [
                pool_label(*one.pool),
                f"{one.batch_size:,}",
                f"{chosen * self.ratios[one]:,.0f}",
                f"{100 * self.ratios[one]:.0f} %",
            ]
            for one in best_of_pools(self).values()
        ]
        clients = counted(self.choice.clients, "client")
        heads = [f"with {clients}", "max_batch_size", "items/s", "of the chosen one's"]
        return table([heads, *rows])

    def _loads(self) -> list[str]:
        """A row for each number of clients."""
        rows = [
            [f"{clients:,}", f"{one.throughput:,.0f}", duration(one.p50), duration(one.p99)]
            for clients, one in self.choice.loads.items()
        ]
        lines = table([["clients", "items/s", "p50", "p99"], *rows])
        if missing := [f"{n:,}" for n in self.clients if n not in self.choice.loads]:
            clients = f"{', '.join(missing)} {'client' if missing == ['1'] else 'clients'}"
            lines += wrapped(f"Not measured, for lack of time: {clients}; see --time.")
        return lines

    def _costs(self) -> str:
        model, first, last = self.model, self.costs[0], self.costs[-1]
        error = f"{100 * model.error:.0f} %"
        if len(self.costs) == 1:
            too_long = "larger ones take too long to be measured in that time"
            return f"A batch of one item costs {duration(first.seconds)}; {too_long}."
        if model.holds:
            return (
                f"The function alone: {duration(model.fixed)} a batch + {duration(model.per_item)} "
                f"an item (within {error} of what was measured)."
            )
        return (
            f"The function alone: {duration(first.per_item)} an item in a batch of one, "
            f"{duration(last.per_item)} in a batch of {last.batch_size:,}."
        )


def _figures(config: Config, clients: int, found: Measurement) -> dict[str, Any]:
    return {
        "mode": config.mode,
        "workers": config.workers,
        "batch_size": config.batch_size,
        "queue_time": config.queue_time,
        "clients": clients,
        "items_per_second": found.throughput,
        "p50_seconds": found.p50,
        "p99_seconds": found.p99,
    }
