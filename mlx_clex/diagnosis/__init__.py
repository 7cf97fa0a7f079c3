"""Diagnose models for `doctor`."""
