"""Tests of batching: from a call to a batch, and from its outcome to the caller."""
