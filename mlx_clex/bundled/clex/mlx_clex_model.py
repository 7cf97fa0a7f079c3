# Lets mlx-lm load this checkpoint wherever mlx_clex is installed.
from mlx_clex.model_file import Model, ModelArgs  # noqa: F401
