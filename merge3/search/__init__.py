"""Search over merges: configuration, optimizers, journal, loop, baselines."""
