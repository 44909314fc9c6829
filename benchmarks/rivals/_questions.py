"""Every question, by the name that a load calls it by."""

from _arrivals import capacity, latency, overload
from _failures import killed, kills, successor
from _front_end import clients, gather, idle, lone_item, many, stop
from _poison import poison
from _service import job
from _starts import start
from _stream import stream
from _trips import cores_busy, hold_up, round_trip

_TO_A_FRONT = (capacity, clients, gather, idle, job, latency, lone_item, many, overload, poison, stop)
_TO_A_POOL = (cores_busy, hold_up, killed, kills, round_trip, start, successor)

QUESTIONS = {question.__name__: question for question in (*_TO_A_FRONT, *_TO_A_POOL, stream)}
