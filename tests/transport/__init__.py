"""Tests of what travels between a pool and its workers: frames, shared memory, large buffers."""
