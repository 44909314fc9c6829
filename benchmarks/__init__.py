"""The benchmarks: see README.md. Nothing here fails on speed."""
