"""Tests of where batches run: the contract of every runner, timeouts, set-up, faults."""
