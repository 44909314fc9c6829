"""Tests of `WorkerPool` and its worker processes."""
