"""CLEX and GeNE for MLX: language models past their trained length.

from mlx_clex import load, attach, make_prompt_cache
"""

from mlx_clex._blas import use_openblas

use_openblas()  # before anything below imports mlx.core

from mlx_clex.attach import attach, make_prompt_cache  # noqa: E402
from mlx_clex.load import load  # noqa: E402

__all__ = ["attach", "load", "make_prompt_cache"]
