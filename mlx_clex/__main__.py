"""The front door: `mlx_clex COMMAND ...`, the same as `python -m mlx_clex COMMAND ...`."""

import difflib
import importlib
import sys
from importlib.metadata import version

from .commands.names import COMMANDS, DESCRIPTIONS

NAMES = list(DESCRIPTIONS)


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
        try:
            print(help_text(), flush=True)
        except BrokenPipeError:  # `| head`
            sys.stderr.close()
    elif name == "--version":
        print(f"mlx_clex {version('mlx-clex')}")
    elif name in NAMES:
        module = "convert.__main__" if name == "convert" else name
        sys.argv = [f"mlx_clex {name}", *sys.argv[2:]]
        try:
            sys.exit(importlib.import_module(f"mlx_clex.{module}").main())
        except KeyboardInterrupt:  # while it was imported
            print(f"\nmlx_clex {name}: interrupted", file=sys.stderr)
            sys.exit(130)
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
