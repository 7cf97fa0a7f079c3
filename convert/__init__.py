"""Convert published checkpoints to MLX; installed as `mlx_clex.convert`."""

from .pipeline import convert

__all__ = ["convert"]
