"""Published checkpoints to MLX ones; installed as `mlx_clex.convert`."""

from .pipeline import convert

__all__ = ["convert"]
