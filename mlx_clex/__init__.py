"""CLEX and GeNE for MLX: language models past their trained length.

from mlx_clex import load, attach, make_prompt_cache
"""

from pathlib import Path

from mlx_clex._blas import use_openblas

_CLONE = Path(__file__).parents[1]
if not (Path(__file__).parent / "convert").exists() and (_CLONE / "convert/pipeline.py").exists():
    # Run in a clone, Python takes this folder and not what was installed from it, and the
    # converter stands beside it: `mlx_clex.convert` is looked up there as well.
    __path__.append(str(_CLONE))

use_openblas()  # before anything below imports mlx.core

from mlx_clex.loading import load  # noqa: E402
from mlx_clex.model.scaled_model import attach, make_prompt_cache  # noqa: E402

__all__ = ["attach", "load", "make_prompt_cache"]
