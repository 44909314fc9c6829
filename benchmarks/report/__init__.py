"""From saved results to the pages and plots.

::

    results/*.json --> results (Record) --> tables, goals, break_even, summary, environment
                                               |  worded by metrics and text
                                               v
                                            render --> BENCHMARK.md, README.md
                                            plots  --> plots/*.svg
"""
