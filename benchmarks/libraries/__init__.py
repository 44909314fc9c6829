"""One adapter for each library, baseline and limit that the benchmarks measure.

Each module runs as a program of its own, ``python -m benchmarks.libraries.NAME LOOP``, in the
environment that the library needs. It imports the standard library and that library only.
"""
