"""What limits the throughput of a batcher, by what its last batches took (pure).

::

    Measured, OptionsInEffect --> the first rule that applies: Finding --> Explanation
                                                                 |              |
                                                                 '-- explanation_text

The rules, in order. Slots count as busy if most batches found none free, or if they were busy for
most of the time; and if items waited for them.

=====================================  ============================================================
too few batches                        "unknown"
most batches waited for a rate         "rate": raise ``rate`` in ``limits``
slots busy, batches full by a cost     "limit": raise ``per_batch`` in ``limits``
slots busy, batches full, their fixed  "size", or "limit" if the queue is smaller than a batch:
cost is at least that of their items   raise ``max_batch_size`` or ``max_queue_size``
slots busy, and more may help          "slots" or "workers": raise ``concurrency``, ``max_workers``
slots busy, batches full               "size" or "limit", if larger batches cost less per item
slots busy                             "workers": the function itself
slots free, batches as large as the    "limit": raise ``max_queue_size``
queue, and older than the window
slots free, batches leave for their    "window": lower ``max_queue_time``, if a call then takes less
age, and waits are long                time
slots free, and long waits             "limit": ``key_concurrency``, or a `Later`
otherwise                              "callers"
=====================================  ============================================================

Rules:

- A larger batch is predicted by `fit_cost_model` from batches of several sizes; without these no
  gain is stated.
- No gain is larger than ``1 + wait for a slot / run time``: no other items could run, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from async_batcher._batching.records import explanation_text
from async_batcher._batching.records.measured import measure
from async_batcher.stats import Explanation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from async_batcher._batching.records.measured import EndedBatch, Measured, OptionsInEffect
    from async_batcher.stats import Bottleneck

MIN_BATCHES = 20

_BUSY = 0.75  # of the time; callers need some to call again
_FULL = 0.8  # of the largest size, on average
_FIXED_DOMINATES = 0.5  # of the time of a batch
_TOGETHER = 0.9  # of the window; items that come at random wait less on average
_LONG_WAIT = 0.5  # of the time of a batch, with slots free
_WORTHWHILE = 1.1  # a smaller gain is within the error of the estimate
_GROWTH_LIMIT = 4  # times the present size; the line was not measured beyond that


class Finding(NamedTuple):
    """What a rule says."""

    bottleneck: Bottleneck
    option: str | None = None
    gain: float | None = None
    suggestion: str | None = None


if TYPE_CHECKING:
    _Rule: TypeAlias = Callable[[Measured, OptionsInEffect], Finding | None]


def explain(batches: Sequence[EndedBatch], options: OptionsInEffect) -> Explanation:
    """Explain what limits throughput.

    Args:
        batches: The last batches that ended.
        options: What they ran with.
    """
    measured = measure(batches, options)
    finding = _find(measured, options)
    if finding.bottleneck == "unknown":
        text = explanation_text.too_few(measured, MIN_BATCHES)
    else:
        text = explanation_text.paragraph(measured, options, finding)
    fill = options.max_batch_size and measured.mean_size / options.max_batch_size
    return Explanation(
        bottleneck=finding.bottleneck,
        batches=measured.batches,
        mean_size=measured.mean_size,
        mean_fill=fill,
        mean_wait=measured.mean_wait,
        mean_run_time=measured.mean_run_time,
        busy_share=measured.busy_share,
        items_per_second=measured.items_per_second,
        option=finding.option,
        expected_gain=finding.gain,
        suggestion=finding.suggestion,
        text=text,
    )


def _find(measured: Measured, options: OptionsInEffect) -> Finding:
    if measured.batches < MIN_BATCHES or measured.seconds <= 0:
        return Finding("unknown")
    if measured.rate_limited > 0.5:
        return Finding("rate", "limits", None, explanation_text.higher_rate())
    rules: list[_Rule] = [_queue_size, _window]
    if _slots_are_busy(measured, options):
        rules = [_cost, _size_if_fixed_dominates, _more_slots, _size, _function]
    findings = (rule(measured, options) for rule in [*rules, _held])
    return next((finding for finding in findings if finding is not None), Finding("callers"))


def _slots_are_busy(measured: Measured, options: OptionsInEffect) -> bool:
    if options.slots is None or measured.demand < _WORTHWHILE:
        return False
    return (measured.busy_share or 0.0) >= _BUSY or measured.found_no_slot >= 0.5


def _held(measured: Measured, options: OptionsInEffect) -> Finding | None:
    """Say that items wait for longer than a free slot and their window account for."""
    if measured.slot_wait <= _LONG_WAIT * measured.mean_run_time:
        return None
    option = "key_concurrency" if options.limits_keys else None
    return Finding("limit", option, None, explanation_text.held(option))


def _cost(measured: Measured, options: OptionsInEffect) -> Finding | None:
    if not options.limits_cost or measured.cost_filled < 0.5:
        return None
    return Finding("limit", "limits", None, explanation_text.larger_cost())


def _size_if_fixed_dominates(measured: Measured, options: OptionsInEffect) -> Finding | None:
    model, size = measured.model, measured.mean_size
    is_dominated = model is not None and model.fixed >= _FIXED_DOMINATES * model.seconds(size)
    return _size(measured, options) if is_dominated else None


def _size(measured: Measured, options: OptionsInEffect) -> Finding | None:
    """Suggest a larger batch, of at most the items that wait when a slot becomes free."""
    size, model = options.largest_batch, measured.model
    if size is None or measured.mean_size < _FULL * size:
        return None
    growth = 2.0 if model is None else max(2.0, model.fixed / max(model.per_item * size, 1e-12))
    option = options.size_option
    if option == "max_batch_size":  # otherwise nothing shows how many callers find the queue full
        # The callers of a batch that has just ended have not called again.
        slots = options.slots or 1
        growth = min(growth, measured.demand * slots / (slots + 1))
    larger = int(size * min(growth, _GROWTH_LIMIT))
    if option == "max_queue_size" and options.max_batch_size is not None:
        larger = min(larger, options.max_batch_size)
    if larger <= size:
        return None
    if model is None:
        suggestion = explanation_text.try_size(option, larger)
        return Finding("workers", option, None, suggestion)
    gain = model.seconds(size) / size * larger / model.seconds(larger)
    if gain < _WORTHWHILE:
        return None
    suggestion = explanation_text.larger_size(option, larger, model, gain)
    return Finding("limit" if option == "max_queue_size" else "size", option, gain, suggestion)


def _more_slots(measured: Measured, options: OptionsInEffect) -> Finding | None:
    """Suggest more slots: for what computes, one for each core at most."""
    slots, option = options.slots or 1, options.slots_option
    if options.runs_in == "coroutines":
        target = 2 * slots
    elif option == "concurrency":
        target = min(options.workers or options.cores, options.cores)
    else:
        target = options.cores
    gain = min(target / slots, measured.demand)
    if gain < _WORTHWHILE:
        return None
    suggestion = explanation_text.more_slots(options, target, gain)
    return Finding("slots" if option == "concurrency" else "workers", option, gain, suggestion)


def _function(_: Measured, options: OptionsInEffect) -> Finding:
    return Finding("workers", suggestion=explanation_text.faster_function(options))


def _queue_size(measured: Measured, options: OptionsInEffect) -> Finding | None:
    if options.size_option != "max_queue_size" or options.max_queue_size is None:
        return None
    if min(measured.queue_filled, measured.timed_out) < 0.5:
        return None
    size = options.max_batch_size or 2 * options.max_queue_size
    return Finding("limit", "max_queue_size", None, explanation_text.larger_queue(size))


def _window(measured: Measured, options: OptionsInEffect) -> Finding | None:
    """Suggest no window, if a call takes longer than it then would.

    Without it an item waits only while others that came before it run: for as long as a batch, if
    the slots are then always busy.
    """
    run_time, model = measured.mean_run_time, measured.model
    window = options.max_queue_time
    if measured.timed_out < 0.5 or window <= 0 or run_time <= 0:
        return None
    call_time = measured.mean_wait + run_time
    busy = 0.0
    if options.slots is not None:
        alone = run_time if model is None else model.seconds(1)
        came_together = measured.mean_wait >= _TOGETHER * window
        others = (measured.mean_size - 1) / run_time
        rate = others if came_together else measured.items_per_second
        busy = min(1.0, rate * alone / options.slots)
    if model is not None:
        size = 1 + busy * (measured.mean_size - 1)
        run_time = min(run_time, model.seconds(max(1, round(size))))
    expected = (1 + busy) * run_time
    gain = call_time / expected if expected > 0 else 1.0
    if gain < _WORTHWHILE:
        return None
    suggestion = explanation_text.no_window(call_time, expected, measured.mean_size)
    return Finding("window", "max_queue_time", gain, suggestion)
