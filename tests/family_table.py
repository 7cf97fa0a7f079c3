"""Prints docs/families.md: `python -m tests.family_table > docs/families.md`."""

from collections.abc import Mapping
from textwrap import fill

from mlx_lm.utils import MODEL_REMAPPING

from . import configuration_table
from .tiny_families import FAMILIES, Family

HEAD = """# Model families

This page lists every model file of mlx-lm {version}, and what `attach` and `convert` do with
it. `tests/model/test_find_ropes.py` checks each row on tiny random weights: at scale 1 the model
equals the stock model; a pass at a higher scale equals the stock model with those
frequencies put in by hand; decoding across two steps of the scale equals a cache that keeps
keys unrotated; and the head, run on parts of a text for perplexity and training, gives the same.

- **scaled**: the layers whose rope is replaced. Layers with a sliding window, a recurrent
  state or no positions keep what they have.
- **keys**: whether cached keys move to a new scale when the text grows. Where they stay, the
  model needs a fixed scale.
- **log_scale**: whether queries can be multiplied, as `log_scale`, `log_gain` and `yarn-t` do.
  They are refused where the rope gets a part of each query (latent attention as in DeepSeek,
  GPT-J) or is not called for queries and then keys, and where keys change after the rotation.
- gemma3n is read, but `lora` refuses it: without a cache, as in training, mlx-lm computes other
  keys for its last layers than in use.
- A model whose rope is stretched already (llama3, longrope, yarn, linear) is served from that
  rope: at scale 1 it equals its source ([details](convert.md#models-that-bring-a-stretched-rope)).
  mlx-lm's `dynamic` rope is refused, because it has no fixed frequencies.

{served} model files are served at a growing scale. {fixed} are served at one fixed scale (`scale=`,
`--scale T`, or linear, ntk and yarn). {refused} are refused, and {absent} are not tested.

{remapped}

"""


def kind(family: Family) -> str:
    """served, fixed, refused or absent."""
    if family.absent:
        return "absent"
    if family.refused:
        return "refused"
    return "fixed" if family.one_scale else "served"


REASONS = {
    "found none": "no rotary attention",
    "only in layers with other caches": "rotary only in layers with a window",
}
CLOSER = {
    "deepseek_v41": "keys go, compressed, into a cache of its own",
    "nanochat": "rotates in a function, not a module that could be replaced",
    "talkie": "rotates in a function, not a module that could be replaced",
}


def table() -> str:
    """The page, as Markdown."""
    from importlib.metadata import version

    kinds = [kind(family) for family in FAMILIES.values()]
    counts = {name: kinds.count(name) for name in ("served", "fixed", "refused", "absent")}
    remapped = ", ".join(f"{name} with {file}" for name, file in MODEL_REMAPPING.items())
    text = fill(
        f"mlx-lm runs some model types with another one's file: {remapped}.",
        100,
        break_on_hyphens=False,
    )
    lines = [HEAD.format(version=version("mlx-lm"), remapped=text, **counts)]
    lines += ["| family | scaled | keys | log_scale |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        if kind(family) in ("served", "fixed"):
            layers = "all layers" if family.scaled is None else "full-attention layers"
            keys = "move" if not family.one_scale else "stay: one fixed scale"
            if family.part == "values" or family.at_end:
                keys += ", rotated part only"
            lines.append(f"| {name} | {layers} | {keys} | {'no' if family.no_gain else 'yes'} |")
    lines += ["", "| family | not served because |", "|---|---|"]
    for name, family in FAMILIES.items():
        if family.refused:
            lines.append(f"| {name} | {CLOSER.get(name, REASONS[family.refused])} |")
        if family.absent:
            lines.append(f"| {name} | not tested: {family.absent} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def page() -> str:
    """The page, as Markdown: mlx-lm's model files, then published configurations."""
    return table() + configuration_table.table()


def summary(outcomes: Mapping[str, set[str]]) -> list[str]:
    """Lines for the end of a test run, from what happened to each family's tests."""
    passed = {name for name, seen in outcomes.items() if seen == {"passed"}}
    groups: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        if kind(family) == "absent":
            groups.setdefault(f"not tested: {family.absent}", []).append(name)
        elif name in passed and family.refused:
            reason = CLOSER.get(name, REASONS[family.refused])
            groups.setdefault(f"refused: {reason}", []).append(name)
        elif name in passed:
            group = "served at one fixed scale" if family.one_scale else "served"
            groups.setdefault(group, []).append(name)
        elif name in outcomes:
            groups.setdefault("FAILED", []).append(name)
    if not outcomes:
        return []
    return ["families"] + [f"{len(g):4} {how}: {', '.join(g)}" for how, g in groups.items()]


if __name__ == "__main__":
    print(page(), end="")
