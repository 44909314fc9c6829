"""Ray Serve's ``@serve.batch`` without a cluster, in a process that poses as a replica.

So the figures hold the batching alone, without a request's way through Serve. It runs only on
request and in an environment of its own, with some seventy distributions.
"""

from __future__ import annotations

from typing import Any

from benchmarks.libraries.base import BatcherAdapter, NotAvailableError, no_stop
from benchmarks.scenarios import workloads


def open_batcher(load: dict[str, Any]) -> BatcherAdapter:
    """Decorate the batch function. The first item makes its queue and task on the round's loop."""
    if load["place"] != "coroutine":
        msg = (
            "its batch function is a coroutine: threads are left to the user, "
            "processes are replicas of a cluster"
        )
        raise NotAvailableError(msg)
    from ray import serve as ray_serve

    _pose_as_replica()
    decorate = ray_serve.batch(
        max_batch_size=load["max_batch_size"], batch_wait_timeout_s=load["max_queue_time"]
    )
    process: Any = decorate(workloads.as_coroutine(workloads.find(load).run))

    async def stop() -> None:
        msg = "has no stop: its task runs until its replica ends"
        raise NotAvailableError(msg)

    return BatcherAdapter(process, process, stop, no_stop)


def _pose_as_replica() -> None:
    """Give Serve the replica that it asks for its limit of concurrent requests."""
    from ray.serve import context
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.schema import ReplicaRank

    context._set_internal_replica_context(  # noqa: SLF001 - the only way without a cluster
        replica_id=ReplicaID("benchmark", DeploymentID(name="benchmark")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=1_000_000),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_batcher, "ray")
