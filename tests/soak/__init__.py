"""Random faults of every kind under load, and what became of every call; see `__main__`."""
