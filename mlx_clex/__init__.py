"""CLEX and GeNE for MLX: language models past their trained length.

from mlx_clex import load, attach, make_prompt_cache
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_clex._blas import use_openblas

if TYPE_CHECKING:
    from mlx_clex.loading import load
    from mlx_clex.model.scaled_model import attach, make_prompt_cache

__all__ = ["attach", "load", "make_prompt_cache"]

_CLONE = Path(__file__).parents[1]
if not (Path(__file__).parent / "convert").exists() and (_CLONE / "convert/pipeline.py").exists():
    # Run in a clone, Python takes this folder and not what was installed from it, and the
    # converter stands beside it: `mlx_clex.convert` is looked up there as well.
    __path__.append(str(_CLONE))

use_openblas()  # before anything imports mlx.core

_HOMES = {
    "attach": "mlx_clex.model.scaled_model",
    "load": "mlx_clex.loading",
    "make_prompt_cache": "mlx_clex.model.scaled_model",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is asked for: transformers alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
