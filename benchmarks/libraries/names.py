"""What the results call each library, and which module is its adapter.

The names are keys of the committed results. Changing one makes older results unreadable.
"""

from __future__ import annotations

OURS = "async_batcher"
DISTRIBUTION = "async-batcher"  # of this project and of 0.2.2
OLD_VERSION = "0.2.2"
OLD = f"async-batcher {OLD_VERSION}"
ONE_BY_ONE = "async_batcher, submit and gather"
OURS_ISOLATING = "async_batcher, isolate()"
OURS_IN_THREADS = "async_batcher, threads"
STREAMED = "async_batcher, streamed"
AT_ONCE = "process_many, all at once"
UNLIMITED = "without deadlines and limits"
OUR_POOL = "async_batcher.WorkerPool"
OUR_POOL_AGAIN = "async_batcher.WorkerPool, again"
AGAIN = "async_batcher, again"  # a second process with the same load shows what is noise
IMPORTABLE = "importable function"
LISTED = "results in a list"
BEST_OF_GRID = "best of a grid"
AIODATALOADER = "aiodataloader"
BATCHED = "batched"
RAY_SERVE = "Ray Serve"
STANDARD_POOL = "ProcessPoolExecutor"
THREADS = "ThreadPoolExecutor"
PROCESSES_BY_HAND = "ProcessPoolExecutor by hand"
THREADS_BY_HAND = "ThreadPoolExecutor by hand"
BY_HAND = "no batching"
INLINE = "inline"
BARE_FUTURES = "bare futures"
BARE_PIPE = "bare pipe"
BARE_LOOP = "bare loop"
BARE_LOOP_AHEAD = "bare loop, two per worker"
MEMORY_COPY = "memory copy"
IMPORT_ASYNCIO = "import asyncio"

NEAREST_POOLS = (STANDARD_POOL, "loky", "pebble")
OTHER_POOLS = ("aiomultiprocess", "joblib")

# Measured only where `--with NAME` asks for it: its environment takes another 400 MB.
ON_REQUEST = (RAY_SERVE,)

# A baseline or a limit lacks what a batcher does, and cannot replace one.
BASELINES = frozenset(
    {
        BY_HAND, THREADS, BARE_FUTURES, BARE_PIPE, BARE_LOOP, BARE_LOOP_AHEAD, MEMORY_COPY, INLINE,
        IMPORT_ASYNCIO, IMPORTABLE, LISTED, BEST_OF_GRID,
    }
)  # fmt: skip

# This project in another configuration: no other library, but listed with its scenario.
VARIANTS = frozenset({ONE_BY_ONE, OURS_ISOLATING, STREAMED, AT_ONCE, UNLIMITED})

ADAPTERS = {
    name: f"benchmarks.libraries.{module}"
    for name, module in {
        OURS: "this_project",
        AGAIN: "this_project",
        OLD: "old_async_batcher",
        AIODATALOADER: "data_loader",
        BATCHED: "batched_processor",
        RAY_SERVE: "ray_serve",
        BARE_FUTURES: "bare_futures",
        BY_HAND: "by_hand",
        OUR_POOL: "worker_pool",
        OUR_POOL_AGAIN: "worker_pool",
        STANDARD_POOL: "standard_pool",
        "loky": "loky_pool",
        "pebble": "pebble_pool",
        "aiomultiprocess": "aiomultiprocess_pool",
        "joblib": "joblib_pool",
        THREADS: "thread_pool",
        MEMORY_COPY: "memory_copy",
        BARE_PIPE: "bare_pipe",
        BARE_LOOP: "bare_loop",
        STREAMED: "streamed",
    }.items()
}
