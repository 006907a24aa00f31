"""Measurements of the layers: `python -m benchmarks.layers --help`."""
