"""How it is measured: interleaved rounds, a process for each library, environments, comparisons."""
