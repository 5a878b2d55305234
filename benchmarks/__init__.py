"""Benchmarks. A package so that `python -m benchmarks.gpu` runs from the checkout."""
