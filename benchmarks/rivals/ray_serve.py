"""Ray Serve's ``@serve.batch``, without a cluster: in a process that has been told that it is a replica.

So the figures hold the batching alone, and not a request's way through Serve. In an environment of its own: it brings seventy
distributions.
"""

from __future__ import annotations

from typing import Any

import _jobs
from _rival import Front, NotAvailableError, no_stop


def open_front(load: dict[str, Any]) -> Front:
    """A batched function; its queue and its task are made on the round's loop by the first item."""
    if load["place"] != "coroutine":
        msg = "its batch function is a coroutine: threads are the user's own affair, processes are replicas of a cluster"
        raise NotAvailableError(msg)
    from ray import serve as ray_serve

    _be_a_replica()
    decorate = ray_serve.batch(max_batch_size=load["max_batch_size"], batch_wait_timeout_s=load["max_queue_time"])
    process: Any = decorate(_jobs.as_coroutine(_jobs.find(load).run))

    async def stop() -> None:
        msg = "has no stop: its task runs until its replica ends"
        raise NotAvailableError(msg)

    return Front(process, process, stop, no_stop)


def _be_a_replica() -> None:
    """The function asks its replica how many requests it may get at a time, to warn of batches that can never fill."""
    from ray.serve import context
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.schema import ReplicaRank

    context._set_internal_replica_context(  # noqa: SLF001 - there is no other way without a cluster
        replica_id=ReplicaID("benchmark", DeploymentID(name="benchmark")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=1_000_000),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )


if __name__ == "__main__":
    from _protocol import serve

    serve(open_front, "ray")
