"""Attach a scaling to a stock model in place of its ropes."""
