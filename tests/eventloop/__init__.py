"""Tests of what batcher and pool share on the event loop."""
