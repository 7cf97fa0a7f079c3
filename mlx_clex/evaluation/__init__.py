"""Measure models: losses, divergences, tasks, result files."""
