"""The front door: `mlx_clex COMMAND ...`, the same as `python -m mlx_clex COMMAND ...`."""

import difflib
import importlib
import sys
from importlib.metadata import version

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
        "compare": "Compare two models on the same text, token by token.",
        "evaluate": "LongBench, RULER, InfiniteBench and other tasks.",
        "plot": "Pictures of results, training runs and learned frequencies.",
    },
    "Look": {
        "plan": "The memory that a model needs at a length, before anything is loaded.",
        "cache": "What mlx_clex keeps in ~/.cache/mlx_clex; delete it.",
        "doctor": "What a model or this machine is, and what would go wrong.",
    },
}
NAMES = [name for group in COMMANDS.values() for name in group]


def help_text() -> str:
    """Return the list of commands, in groups."""
    lines = [
        "usage: mlx_clex COMMAND ...",
        "",
        "Language models past their trained length, on MLX.",
    ]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:14}{text}" for name, text in commands.items())]
    return "\n".join(
        [
            *lines,
            "",
            "mlx_clex COMMAND --help lists the options of a command.",
            "First steps: mlx_clex generate --max-tokens 100",
        ]
    )


def main() -> None:
    """Run the command that the first argument names, and exit with its status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"mlx_clex {version('mlx-clex')}")
    elif name in NAMES:
        module = "convert.__main__" if name == "convert" else name
        sys.argv = [f"mlx_clex {name}", *sys.argv[2:]]
        importlib.import_module(f"mlx_clex.{module}").main()
    else:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        print(
            f"mlx_clex: error: There is no command {name!r}{hint} Commands: {', '.join(NAMES)}.",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
