"""Ranks, slices, intervals: what a recommender is worth."""
