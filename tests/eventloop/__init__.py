"""Tests of the asyncio helpers that batcher and pool share."""
