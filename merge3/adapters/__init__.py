"""merge3's kernels inside other tools. Nothing in merge3 imports these."""
