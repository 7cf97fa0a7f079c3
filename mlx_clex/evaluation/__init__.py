"""Measuring models: losses, divergences, tasks, result files."""
