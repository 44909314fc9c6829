"""Example programs; the tests run them."""
