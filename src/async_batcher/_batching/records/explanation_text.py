"""The sentences of an `Explanation` (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._serialization.exception_text import counted, duration

if TYPE_CHECKING:
    from async_batcher._batching.records.batch_cost import CostModel
    from async_batcher._batching.records.explain import Finding
    from async_batcher._batching.records.measured import Measured, OptionsInEffect

_LIMITS: dict[str, str] = {
    "window": (
        "The window limits throughput: most batches leave because an item has waited for "
        "max_queue_time, while slots are free."
    ),
    "size": (
        "The size of the batches limits throughput: items wait while full batches run, and a "
        "larger batch would take less time for each item."
    ),
    "limit": (
        "The size of the queue limits throughput: no batch can have more than max_queue_size "
        "items, and most have as many."
    ),
    "cost": (
        "A limit on the cost of a batch limits throughput: items wait while batches run that use "
        "it up."
    ),
    "held": (
        "Items wait although slots are free: for other batches of their key, or until a Later or a "
        "retry lets them run again."
    ),
    "slots": (
        "The slots limit throughput: items wait because as many batches run as concurrency allows."
    ),
    "workers": "The workers limit throughput: items wait because all workers are busy.",
    "rate": "A rate limits throughput: most batches waited for it, with slots free.",
    "callers": (
        "The callers limit throughput: items hardly wait for others, so only more concurrent calls "
        "would raise it."
    ),
}


def paragraph(measured: Measured, options: OptionsInEffect, finding: Finding) -> str:
    """Write what was measured, what limits it, and what to change."""
    limit = _LIMITS[finding.bottleneck]
    if finding.bottleneck == "limit" and finding.option != "max_queue_size":
        limit = _LIMITS["cost" if finding.option == "limits" else "held"]
    parts = [_throughput(measured, options), _times(measured), limit]
    return " ".join([*parts, finding.suggestion or ""]).rstrip()


def too_few(measured: Measured, needed: int) -> str:
    batches = "1 batch has" if measured.batches == 1 else f"{measured.batches:,} batches have"
    return (
        f"Too little was measured to say what limits throughput: {batches} run, in "
        f"{duration(measured.seconds)}. At least {needed} batches are needed."
    )


def _throughput(measured: Measured, options: OptionsInEffect) -> str:
    fill = ""
    if options.max_batch_size is not None:
        percent = _percent(measured.mean_size / options.max_batch_size)
        fill = f", {percent} of max_batch_size"
    return (
        f"The last {measured.batches:,} batches had {_items(measured.mean_size)} on average{fill}, "
        f"and the throughput was {_number(measured.items_per_second)} items/s."
    )


def _times(measured: Measured) -> str:
    wait, run_time = duration(measured.mean_wait), duration(measured.mean_run_time)
    means = f"An item waited for {wait} and a batch ran for {run_time} on average"
    if measured.busy_share is None:
        return f"{means}."
    return f"{means}, and the slots were busy for {_percent(measured.busy_share)} of the time."


def larger_size(option: str, size: int, model: CostModel, gain: float) -> str:
    return (
        f"A batch takes about {duration(model.fixed)}, and {duration(model.per_item)} for each "
        f"item: {option}={size} should raise the throughput by a factor of about {gain:.2g}."
    )


def try_size(option: str, size: int) -> str:
    return (
        f"These batches do not show what a larger one would take: try {option}={size}, and compare "
        "the throughput."
    )


def more_slots(options: OptionsInEffect, target: int, gain: float) -> str:
    option = f"{options.slots_option}={target}"
    if options.slots_option == "max_workers" and options.concurrency is not None:
        option += f", with concurrency={target},"
    effect = f"{option} should raise the throughput by a factor of up to {gain:.2g}"
    if options.runs_in == "coroutines":
        return f"{effect}, if what process_batch awaits can do that many batches at a time."
    if options.runs_in == "threads":
        safe = "is thread-safe and " if options.workers is None else ""
        return f"{effect}, if process_batch {safe}releases the GIL."
    return f"{effect}, if {options.cores} cores are free for it."


def faster_function(options: OptionsInEffect) -> str:
    workers, cores = counted(options.slots or 1, "worker"), counted(options.cores, "core")
    return f"With {workers} on {cores}, only a faster process_batch or more cores would help."


def held(option: str | None) -> str | None:
    if option is None:
        return None
    return "Raise key_concurrency, or use more keys, if the order within a key allows it."


def larger_cost() -> str:
    return (
        "Most batches use up the per_batch of a Limit in limits. Raise it if process_batch takes "
        "less time per item in larger batches."
    )


def higher_rate() -> str:
    return "Raise the rate of the Limit in limits, if what the batches call allows it."


def larger_queue(size: int) -> str:
    return f"Raise max_queue_size to at least {size}, so that a batch can fill up."


def no_window(call_time: float, expected: float, size: float) -> str:
    batches = ", in smaller batches" if size >= 1.5 else ""
    return (
        f"With max_queue_time=0 a call should take about {duration(expected)} rather than "
        f"{duration(call_time)} on average{batches}."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _items(count: float) -> str:
    number = _number(count)
    return f"{number} item" if number == "1" else f"{number} items"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
