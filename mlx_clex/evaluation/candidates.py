"""The models that one run measures: their labels, loading, scalings and lengths.

Not covered: what is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..bundled import MODELS, PREFIX
from ..checkpoint.fingerprint import fingerprint, short
from ..errors import InputError
from ..loading import load, resolve
from ..model.own_rope import say_if_dropped
from ..model.scaled_model import attach, scaled
from ..scaling import SCALINGS

BUNDLED_TIMES = (1, 2, 4, 8, 16)  # default lengths of the bundled models, in trained lengths
_TIMES = (1, 2, 4)  # of other models


@dataclass(frozen=True)
class Candidate:
    """A model with its own or a replaced scaling: a line of the table and of the picture."""

    label: str
    path: str  # a folder, a .gguf file or a Hugging Face id
    entry: Mapping[str, Any] | None  # rope_scaling that replaces its own; None keeps its own
    model: str  # short fingerprint of the model
    trained_length: int | None  # tokens
    reach: int | None  # tokens


class Loader:
    """Load models and keep the last one in memory."""

    def __init__(
        self,
        *,
        scale: float | None = None,
        adapter_path: str | None = None,
        trust_remote_code: bool = False,
        own_rope: str | None = None,
    ) -> None:
        """Keep the options of `load`, and `own_rope` of `attach`; nothing is loaded yet."""
        self.adapter_path = adapter_path
        self._options: dict[str, Any] = {
            "scale": scale,
            "adapter_path": adapter_path,
            "trust_remote_code": trust_remote_code,
        }
        self._own_rope = own_rope
        self._path = ""
        self._loaded: tuple[Any, ...] = ()

    def load(self, path: str) -> tuple[nn.Module, Any]:
        """Return (model, tokenizer)."""
        if path != self._path:
            self._path, self._loaded = "", ()  # free the last model first
            self._loaded = load(path, **self._options)
            if self._own_rope is not None:
                say_if_dropped(self._loaded[0], self._own_rope)
                attach(self._loaded[0], {"type": "none"}, own_rope=self._own_rope)
            self._path = path
        return self._loaded[0], self._loaded[1]

    def with_scaling(self, path: str, entry: Mapping[str, Any] | None) -> nn.Module:
        """Return the model with the scaling `entry`; None keeps its current scaling."""
        model, _ = self.load(path)
        if entry is not None:
            length = scaled(model).trained_length
            attach(model, entry, trained_length=length, own_rope=self._own_rope)
        return model

    def candidate(self, label: str, path: str, entry: Mapping[str, Any] | None = None) -> Candidate:
        """Load a model and return what a run keeps of it."""
        model = self.with_scaling(path, entry)
        return Candidate(
            label,
            path,
            entry,
            short(fingerprint(model, resolve(path), self.adapter_path)),
            scaled(model).trained_length,
            scaled(model).reach,
        )


def labels_of(paths: Sequence[str] | None, adapter_path: str | None) -> dict[str, str]:
    """Return the paths of models by label; without paths, the bundled models.

    Raises:
        InputError: adapters for more than one model.
    """
    if not paths:
        paths = list(MODELS.values())
    paths = list(dict.fromkeys(paths))
    names = [Path(path).name.removeprefix(PREFIX) or path for path in paths]
    if len(set(names)) < len(names):
        names = paths
    if adapter_path:
        if len(paths) > 1:
            raise InputError("--adapter-path needs a single --model. Fuse the adapters first.")
        names = [f"{names[0]} + {Path(adapter_path).name}"]
    return dict(zip(names, paths, strict=True))


def only_bundled(paths: Sequence[str] | None) -> bool:
    """Return whether all models are bundled ones; no paths stand for these."""
    return set(paths or ()) <= set(MODELS.values())


def default_lengths(model: nn.Module, label: str, *, bundled: bool) -> list[int]:
    """Return multiples of the trained length that the model can read, tokens, shortest first.

    Raises:
        InputError: the trained length is unknown.
    """
    trained, limit = scaled(model).trained_length, scaled(model).limit
    if trained is None:
        raise InputError(f"The trained length of {label} is unknown. Give --lengths.")
    times = BUNDLED_TIMES if bundled else _TIMES
    return [n * trained for n in times if limit is None or n * trained <= limit]


def replacement(name: str, factor: float) -> tuple[str, dict[str, Any]]:
    """Return a label and the rope_scaling entry of a scaling that reaches `factor` x L0."""
    options = SCALINGS[name].options_for(factor)
    return " ".join([name, *(f"{value:g}" for value in options.values())]), {
        "type": name,
        **options,
    }
