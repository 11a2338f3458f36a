"""Tiny models and their questions, made here from scratch: what tests, benchmarks, examples and the demo share.

Knows transformers and training, and nothing of merging. `kept.made` makes a world once and keeps it.
"""
