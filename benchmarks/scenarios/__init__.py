"""What is measured: each scenario runs one round over a library's adapter, in its process.

A scenario checks every result. A wrong one is an error, not a figure. The modules import the
standard library only, unless a workload needs more, so that they run in every environment.
"""
