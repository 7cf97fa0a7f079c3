"""Checkpoint folders: configs, tensor names, adapters, saved caches."""
