"""Cases that cannot pass, each with its reason; the trial counts them and fails if one passes."""

KNOWN: dict[str, str] = {}
