"""The tests of the benchmarks' harness and report; none measures speed."""
