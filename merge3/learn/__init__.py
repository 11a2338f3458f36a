"""Weights of a merge that are learned from items by gradient, and what is fitted on top of a merge.

Knows the live model and what items ask of it; nothing of searches.
"""
