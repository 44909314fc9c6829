"""Tests of the front end: from a call to a batch and back."""
