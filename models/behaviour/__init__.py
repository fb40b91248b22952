"""Logs -> item vectors: sequence encoders, item sources, RAT."""
