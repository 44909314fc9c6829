"""Why the options were chosen, in a sentence or two for each (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._serialization.exception_text import duration
from async_batcher.cli.tune.model import pool_label
from async_batcher.cli.tune.windows import NEAR_THE_BEST
from async_batcher.cli.tune.words import counted

if TYPE_CHECKING:
    from async_batcher.cli.tune.model import Config
    from async_batcher.cli.tune.report import TuneReport

# Times what one thread does: a function that holds the GIL gains little from a second one.
_RELEASES_GIL = 1.3
_CALL_DIRECTLY = 2.0  # times the throughput of single calls


def explain(report: TuneReport) -> list[str]:
    sentences = [
        _explain_clients(report),
        _explain_mode(report),
        _explain_workers(report),
        _explain_size(report),
        _explain_window(report),
        _explain_lists(report),
    ]
    return [sentence for sentence in sentences if sentence]


def best_of_pools(report: TuneReport) -> dict[tuple[str, int], Config]:
    """Return the best batch size of each pool, without a window, best first."""
    best: dict[tuple[str, int], Config] = {}
    ranked = sorted(report.points, key=lambda one: report.ratios[one], reverse=True)
    chosen = report.choice.config._replace(queue_time=0.0)
    for config in [chosen, *(one for one in ranked if not one.queue_time)]:
        best.setdefault(config.pool, config)
    return dict(sorted(best.items(), key=lambda pair: -report.ratios[pair[1]]))


def _throughput(report: TuneReport, config: Config) -> float:
    return report.points[config].throughput


def _explain_clients(report: TuneReport) -> str:
    if report.choice.clients == max(report.clients):
        return ""
    with_more = f"{counted(report.choice.clients, 'client')} decide: with more, a call takes"
    if report.target_latency is not None and report.choice.meets_target:
        return f"{with_more} longer than {duration(report.target_latency)}."
    return f"{with_more} too long to compare options in the time."


def _explain_mode(report: TuneReport) -> str:
    config, best = report.choice.config, best_of_pools(report)
    if report.plan.skips_processes:
        takes = duration(report.start_seconds)
        return (
            f"processes were not measured: a worker takes {takes} to start, which is too much "
            "of the time; allow more with --time."
        )
    other = next((one for pool, one in best.items() if pool[0] != config.mode), None)
    if other is None:
        return ""
    start = {None: "no executor", "thread": "threads", "process": "processes"}[config.executor]
    ratio = _ratio(report, other)
    one_thread = best.get(("threads", 1))
    gil = ""
    is_thread = config.executor == "thread" and not report.warnings()
    if is_thread and one_thread and _ratio(report, one_thread) >= _RELEASES_GIL:
        gil = " The function releases the GIL."
    if ratio * NEAR_THE_BEST > 1:
        return f"{start}: {ratio:.2f} x the throughput of {pool_label(*other.pool)}.{gil}"
    few = counted(min(report.clients), "client")
    return (
        f"{start}: within 5 % of the throughput of {pool_label(*other.pool)}, and with {few} a "
        f"call takes no longer.{gil}"
    )


def _explain_workers(report: TuneReport) -> str:
    config = report.choice.config
    same = [one for one in best_of_pools(report).values() if one.mode == config.mode]
    shown = [
        f"{one.workers} {'does' if one.workers == 1 else 'do'} {_percent(report, one)}"
        for one in sorted(same, key=lambda one: one.workers)
        if one.workers != config.workers
    ]
    if not shown:
        return ""
    name = "max_workers" if config.executor else "one thread"
    start = f"{name}={config.workers}" if config.executor else name
    return f"{start}: {', '.join(shown)} of that."


def _explain_size(report: TuneReport) -> str:
    config = report.choice.config
    same = sorted(
        one.batch_size for one in report.points if one.pool == config.pool and not one.queue_time
    )
    index = same.index(config.batch_size)
    beside = same[max(0, index - 1) : index] + same[index + 1 : index + 2]
    start = f"max_batch_size={config.batch_size}"
    one_for_all = f"{start}: all {report.choice.clients:,} clients fit into one batch"
    if not beside:
        return f"{start}: no other size was measured."
    plain = config._replace(queue_time=0.0)
    shown = [f"{n:,} does {_percent(report, plain._replace(batch_size=n))}" for n in beside]
    if config.batch_size >= report.choice.clients > 1:
        return f"{one_for_all}; {', '.join(shown)} of that."
    return f"{start}: {', '.join(shown)} of that."


def _explain_window(report: TuneReport) -> str:
    config = report.choice.config
    plain = config._replace(queue_time=0.0)
    start = f"max_queue_time={config.queue_time:g}"
    if config.batch_size == 1:
        return f"{start}: a batch of one item has nothing to wait for."
    others = [one for one in report.windows if one.queue_time]
    if not others:
        return f"{start}: there was no time to measure others."
    clients = report.choice.clients
    if config.queue_time:
        gain = report.windows[config][clients].throughput / _throughput(report, plain)
        better = f"{start}: {gain:.2f} x the throughput of 0"
        few = min(report.windows[config].keys() & report.windows[plain].keys())
        waits, usual = (duration(report.windows[one][few].p50) for one in (config, plain))
        who = counted(few, "client")
        return f"{better}; with {who} p50 is {waits} instead of {usual}."
    tried = " and ".join(f"{one.queue_time:g}" for one in others)
    return f"{start}: {tried} did not raise the throughput by 5 %."


def _explain_lists(report: TuneReport) -> str:
    possible = [cost for cost in report.costs if cost.batch_size <= report.choice.clients]
    fastest = min(possible, key=lambda cost: cost.per_item)
    alone = 1 / fastest.per_item
    if alone < _CALL_DIRECTLY * report.choice.loads[report.choice.clients].throughput:
        return ""
    size = fastest.batch_size
    lists = "a list of one item" if size == 1 else f"lists of {size:,}"
    return (
        f"Called directly with {lists}, the function does {alone:,.0f} items/s: it is cheap, "
        "and single calls cost more than it does. Where you have lists, call it with them."
    )


def _ratio(report: TuneReport, other: Config) -> float:
    return 1 / report.ratios[other]


def _percent(report: TuneReport, other: Config) -> str:
    return f"{100 * report.ratios[other]:.0f} %"
