"""The benchmarks: questions, each put to us and to our rivals in turn. Nothing here fails on speed; it reports.

::

    pytest benchmarks --> test_*.py: a question and its load
                            | contest.py: A B C A B C ..., one round each, so that a noisy machine is noisy for all
                            v
                          children.py: one long-lived process for each rival and loop, told "one round" over a pipe
                            v
                          rivals/: one adapter each, under the same questions, its answers checked there: _questions.py
                            |      to what batches (a `Front`), _trips.py to what has worker processes (a `Pool`)
                            | rounds
                            v
    results/*.json (written by pytest-benchmark) --report.py--> BENCHMARK.md

================  ==========================================================================================
module            one responsibility
================  ==========================================================================================
``contest``       rounds in turn; what pytest-benchmark records of them
``children``      a rival's process, and what is said to it
``environments``  a virtual environment of its own for a rival that cannot share ours
``machine``       what the figures were measured on; no name of host or user, no path
``spread``        median, minimum, quartiles (pure)
``questions``     what each question is called, what tells its benchmarks apart, its goals (pure)
``figures``       how figures are found in the results, and written (pure)
``report``        the saved results as tables in BENCHMARK.md (pure, but for reading and writing the files)
================  ==========================================================================================
"""
