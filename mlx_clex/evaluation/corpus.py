"""Load the text that `perplexity` and `compare` measure on."""

from typing import Any

import numpy as np

from ..bundled import held_out_text
from ..checkpoint.files import expand
from ..data.corpus import Corpus, load_corpora
from ..errors import InputError
from ..loading import DEFAULT_CACHE


def corpus_of(data: str | None, split: str, tokenizer: Any) -> Corpus:
    """Return the tokens of --data, or of the bundled held-out text where it is None.

    Raises:
        InputError: the data cannot be read, or it lacks the split.
    """
    if data is None:
        ids = np.array(tokenizer.encode(held_out_text(), verbose=False), np.uint32)
        return Corpus("The bundled text", ids, np.array([0]), np.array([0]))
    path = expand(data)
    corpora = load_corpora(
        path, tokenizer, mask_prompt=False, cache_dir=DEFAULT_CACHE, splits=[split]
    )
    if split not in corpora:
        raise InputError(f"--data {data} has no {split} split. Give another --split.")
    return corpora[split]
