"""RULER's effective context length, from results."""

from collections import defaultdict

from .results import Results

# RULER (arXiv 2404.06654) calls a length effective where a model does better than
# Llama-2-7B does at 4,096 tokens.
RULER_THRESHOLD = 0.856


def effective_length(results: Results, label: str) -> tuple[dict[int, float], int | None]:
    """RULER's effective context length of a model.

    Args:
        results: of the kind evaluate; of their rows, those with a length count.
        label: the model.

    Returns:
        The mean over the tasks that have all of the lengths, by length, and the longest
        length at which it is above RULER_THRESHOLD, as at all shorter ones; None where it is
        at none.
    """
    tasks = ruler_tasks(results, label)
    lengths = sorted({length for scores in tasks.values() for length in scores})
    whole = [scores for scores in tasks.values() if len(scores) == len(lengths)]
    means = {n: sum(scores[n] for scores in whole) / len(whole) for n in lengths if whole}
    effective = None
    for length, mean in means.items():
        if mean <= RULER_THRESHOLD:
            break
        effective = length
    return means, effective


def ruler_tasks(results: Results, label: str) -> dict[str, dict[int, float]]:
    """A model's scores by task and length, of the tasks that have several lengths."""
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for row in results.rows:
        if row["label"] == label and row["length"] is not None:
            scores[row["task"]][row["length"]] = row["value"]
    return scores
