"""Benchmarks. Run `python -m benchmarks.NAME` in the root of the project."""
