"""Cases that cannot pass, each with its reason; the trial counts them and fails if one passes."""

KNOWN: dict[str, str] = {
    "prompt cache: a model of the hub: cache-alone": "without --model, generate loads the "
    "model that the cache names; see SECURITY.md",
}
