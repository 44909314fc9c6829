"""Every scenario, by the name that loads, results and pages use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.scenarios import (
    bad_item,
    front_end,
    open_loop,
    overlap,
    pool_start,
    round_trips,
    service,
    streaming,
    worker_crashes,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# The names are keys of the committed results. Changing one makes older results unreadable.
SCENARIOS: dict[str, Callable[..., Awaitable[Any]]] = {
    # over a `BatcherAdapter`
    "clients": front_end.clients,
    "gather": front_end.gather,
    "many": front_end.many,
    "lone_item": front_end.single_request,
    "stop": front_end.stop,
    "idle": front_end.idle,
    "capacity": open_loop.capacity,
    "latency": open_loop.latency,
    "overload": open_loop.overload,
    "poison": bad_item.bad_item,
    "batch_of_one": front_end.clients,
    "batch_gap": overlap.batch_gap,
    "early_results": overlap.early_results,
    "job": service.service,
    # over a `PoolAdapter`
    "round_trip": round_trips.round_trip,
    "call_cpu": round_trips.call_cpu,
    "cores_busy": round_trips.cores_busy,
    "script_busy": round_trips.script_busy,
    "hold_up": round_trips.loop_block_time,
    "successor": worker_crashes.replacement,
    "killed": worker_crashes.killed_under_load,
    "kills": worker_crashes.kills,
    "start": pool_start.start,
    # over a `StreamingBatcher`
    "stream": streaming.stream,
}
