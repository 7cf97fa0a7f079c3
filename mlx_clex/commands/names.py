"""The commands, in the groups of `mlx_clex --help`: name -> what it does."""

COMMANDS = {
    "Use a model": {
        "generate": "Generate text from a prompt of any length up to the model's reach.",
        "chat": "Talk with a model in the terminal, long documents included.",
        "web": "Talk with a model in the browser, on this machine alone.",
        "server": "Serve a model to OpenAI clients, each request at its own scale.",
        "cache_prompt": "Read a document once and save its cache for generate.",
    },
    "Make a model": {
        "convert": "Convert a CLEX, GeNE or base checkpoint to MLX, or freeze one scale.",
        "lora": "Fine-tune a model for longer texts than it was trained on.",
        "fuse": "Merge adapters and their scaling into a complete checkpoint.",
    },
    "Measure a model": {
        "perplexity": "Perplexity of models on a text, by length.",
        "passkey": "Hide a fact in texts of chosen lengths, and ask for it.",
        "compare": "Compare two models on the same text, by position.",
        "evaluate": "LongBench, RULER, InfiniteBench and other tasks.",
        "plot": "Pictures of results, training runs and learned frequencies.",
    },
    "Look": {
        "plan": "The memory that a model needs at a length, before anything is loaded.",
        "cache": "What mlx_clex keeps in ~/.cache/mlx_clex; delete it.",
        "doctor": "What a model or this machine is, and what would go wrong.",
    },
}
DESCRIPTIONS = {name: text for group in COMMANDS.values() for name, text in group.items()}
