"""`WorkerPool`: the project's own process pool, on the event loop.

::

    _pool.py      WorkerPool: what users see; one life after the other
    _executor.py  the same as a concurrent.futures.Executor
    _crew.py      one life of it: which worker gets which batch, and what becomes of each
    _staff.py     its workers: who is there, who takes another's place, what is done when they will not start
    _census.py    how many there were, and how they ended
    _member.py    one worker: its tasks, its time, its end
    _channel.py   frames to and from one worker, over a socket that the loop watches
    _freight.py   large buffers on their way to one worker and back
    _blocks.py    the shared memory that is lent to one worker
    _launch.py    how worker processes are started: fork server, spawn, fork
    _server.py    the fork server, as its parent sees it
    _processes.py who owns a process, how its end is seen
    _aside.py     what would hold the loop up goes to a helper thread
    _task.py      one batch on its way
    _turns.py     whose turn it is (pure)

On the other side of the channel: ``_child.py``, and ``_forkserver.py``, which forks the workers.
"""
