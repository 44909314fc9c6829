"""`WorkerPool`: the project's own process pool, on the event loop.

::

    _pool.py      WorkerPool: what users see; one life after the other
    _executor.py  the same as a concurrent.futures.Executor
    _crew.py      the workers of one life: who gets which batch, who is replaced, who is started again
    _member.py    one worker: its tasks, its time, its end
    _channel.py   frames to and from one worker, over a socket that the loop watches
    _blocks.py    the shared memory that is lent to one worker
    _launch.py    how worker processes are started: fork server, spawn, fork
    _server.py    the fork server, as its parent sees it
    _processes.py who owns a process, how its end is seen
    _aside.py     what would hold the loop up goes to a helper thread
    _task.py      one batch on its way
    _turns.py     whose turn it is (pure)

On the other side of the channel: ``_child.py``, and ``_forkserver.py``, which forks the workers.
"""
