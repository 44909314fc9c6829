"""The benchmarks: questions, each put to us and to our rivals in turn. Nothing here fails on speed; it reports.

::

    python -m benchmarks --> test_*.py, run by pytest: what is asked, under which loads, of whom
                               | contest.py: A B C A B C ..., one round each, so that a noisy machine is noisy for all
                               v
                             children.py: one long-lived process for each rival and loop, told "one round" over a pipe
                               v
                             rivals/: an adapter for each rival, which opens a `Front` (what batches) or a `Pool` (worker
                               |      processes); the questions of rivals/_questions.py are put to it, and its answers checked
                               | rounds
                               v
    results/*.json (written by pytest-benchmark) --report.py--> BENCHMARK.md, the README's figures, plots/*.svg

``test_executors.py`` is a benchmark apart: threads against processes in plain pytest-benchmark, without rivals, in a minute.
``pytest benchmarks/test_executors.py --benchmark-group-by=group`` shows it, and ``--benchmark-compare`` works as it always does.

================  ==========================================================================================
module            one responsibility
================  ==========================================================================================
``__main__``      all of it in one command, each benchmark into its own results file
``modes``         how much is measured: quick, usual, full
``contest``       rounds in turn; what pytest-benchmark records of them
``children``      a rival's process, and what is said to it
``environments``  a virtual environment of its own for a rival that cannot share ours
``interpreters``  a fresh interpreter that imports a module
``calibration``   how much work takes how long on this machine
``machine``       what the figures were measured on; no name of host or user, no path
``spread``        median, minimum, quartiles (pure)
``rows``          a row for each library, for pytest-benchmark's own tables (pure)
``questions``     what each question is called, what tells its benchmarks apart, its goals (pure)
``figures``       how figures are found in the results, and written (pure)
``tables``        a question's figures as a table (pure)
``verdicts``      where we lose, and the goals (pure)
``crossings``     from how much work on a pool beats threads (pure)
``headlines``     the few figures that the README names (pure)
``provenance``    machine, versions and noise, as the page says them (pure)
``plots``         the plots
``report``        the pages, with all of these in their places
================  ==========================================================================================
"""
