"""The parsers of whole folders that `fuzz.py` tries: tokenizers, PEFT adapters and cards."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mlx_clex.convert.write.card import licence_of

from mlx_clex.checkpoint import adapters
from mlx_clex.checkpoint.folder import read_config
from mlx_clex.checkpoint.tokenizer import open_tokenizer
from mlx_clex.loading import _load_model

from ..make_peft_data import TARGET as PEFT
from ..make_peft_data import base_folder
from .fuzz_inputs import BYTES, VALUES, Target, mutated, objects

_CARD = b"---\nlicense: mit\nlibrary_name: mlx\ntags:\n- mlx\n---\n# A model\n"


def folder_targets(folder: Path, checkpoint: Path) -> Iterator[Target]:
    """Yield the parsers.

    Args:
        folder: an empty one, for files.
        checkpoint: a valid one, with a tokenizer.json.
    """
    copy = shutil.copytree(checkpoint, folder / "checkpoint")
    config = read_config(copy)

    def of_tokenizer(name: str) -> Callable[[Any], object]:
        whole = (copy / name).read_bytes()

        def run(value: Any) -> object:
            try:
                (copy / name).write_text(json.dumps(value))
                return open_tokenizer(copy, config)
            finally:
                (copy / name).write_bytes(whole)

        return run

    whole = json.loads((copy / "tokenizer.json").read_text())
    parts = [name for name, value in whole.items() if isinstance(value, dict) and value]
    files = st.one_of(
        objects(whole),
        st.sampled_from(parts).flatmap(
            lambda part: objects(whole[part]).map(lambda new: {**whole, part: new})
        ),
        VALUES,
    )
    yield Target("tokenizer.json", files, of_tokenizer("tokenizer.json"), 600)
    more = ("chat_template", "tokenizer_class", "auto_map", "bos_token", "extra_special_tokens")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    yield Target(
        "tokenizer_config.json",
        st.one_of(objects(settings, more), VALUES),
        of_tokenizer("tokenizer_config.json"),
        400,
    )

    def generation(value: Any) -> None:
        (copy / "generation_config.json").write_text(json.dumps(value))
        open_tokenizer(copy, read_config(copy))

    ends = objects({"eos_token_id": [0], "temperature": 1.0}, ("bos_token_id", "max_length"))
    yield Target("generation_config.json", st.one_of(ends, VALUES), generation, 400)

    trained = shutil.copytree(PEFT / "lora", folder / "peft")
    base = base_folder(folder / "base")
    given = json.loads((trained / "adapter_config.json").read_text())

    def add(value: Any) -> None:
        (trained / "adapter_config.json").write_text(json.dumps(value))
        model, _ = _load_model(base, None, None)
        adapters.add_adapters(model, trained, None)

    yield Target("PEFT's adapter_config", objects(given), add, 1_000)

    def card(data: bytes) -> object:
        (copy / "README.md").write_bytes(data)
        return licence_of(copy)

    fields = objects({"license": "mit", "tags": ["mlx"]}, ("base_model", "model-index"))
    cards = st.one_of(
        mutated(_CARD),
        fields.map(lambda new: b"---\n" + json.dumps(new).encode() + b"\n---\n"),
        BYTES,
    )
    yield Target("card", cards, card, 2_000)
