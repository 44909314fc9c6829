"""From saved results to the pages and plots.

::

    results/*.json --> results (Record) --> tables, goals, break_even, summary, environment,
                                            executors
                                               |  worded by metrics and text; topics selects
                                               v  what BENCHMARK.md shows
                                            render --> BENCHMARK.md, results/README.md, README.md
                                            plots  --> plots/*.svg
"""
