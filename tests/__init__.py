"""The tests; each docstring is the promise that the test checks."""
