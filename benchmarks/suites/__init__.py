"""Which scenarios run under which loads: one module, and one file of results, for each topic."""
