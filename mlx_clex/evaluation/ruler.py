"""Compute RULER's effective context length from results."""

from collections import defaultdict

from .results import Results

# RULER (arXiv 2404.06654) calls a length effective if the score there is higher than that of
# Llama-2-7B at 4,096 tokens.
RULER_THRESHOLD = 0.856


def effective_length(results: Results, label: str) -> tuple[dict[int, float], int | None]:
    """Return a model's mean score by length and its effective context length.

    Args:
        results: results of the kind "evaluate"; rows without a length are ignored.
        label: the model.

    Returns:
        (means, effective). `means` has the mean score at each length, over the tasks that were
        run at all lengths. `effective` is the longest length, tokens, at which this mean and
        the means at all shorter lengths are above RULER_THRESHOLD; None if there is none.
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
    """Return a model's scores by task and length, for tasks with lengths."""
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for row in results.rows:
        if row["label"] == label and row["length"] is not None:
            scores[row["task"]][row["length"]] = row["value"]
    return scores
