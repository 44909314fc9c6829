"""`WorkerPool`: the project's own process pool, on the event loop.

::

    _pool.py      WorkerPool: what users see; one life after the other
    _executor.py  the same as a concurrent.futures.Executor
    _crew.py      the workers of one life: who gets which batch, who is replaced, who is started again
    _member.py    one worker: its channel, its blocks of shared memory, its time, its end
    _launch.py    how processes are started, and how their end is seen
    _task.py      one batch on its way
    _turns.py     whose turn it is (pure)

On the other side of the channel: ``_child.py``, and ``_forkserver.py``, which forks the workers.
"""
