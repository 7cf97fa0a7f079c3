"""Imports point one way: each room of the house knows only those before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room, and the ones before it that it may import. Rooms on one line do not know each other.
ORDER = [
    ["_blas", "errors"],
    ["scaling"],
    ["model"],
    ["bundled"],
    ["checkpoint"],
    ["model_file"],
    ["convert"],
    ["loading"],
    ["data"],
    ["evaluation", "serving", "diagnosis"],
    ["training"],
    ["self_test"],
    ["pictures"],
    ["commands"],
    ["a command"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(
    path
    for folder in ("mlx_clex", "convert")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "mlx_clex_model.py"  # of a bundled model: what converted folders carry
)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mlx_clex", *parts) if parts[0] == "convert" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    """The room a module of the package is in; the commands at its root are one."""
    if module in {("mlx_clex",), ("mlx_clex", "convert", "__main__")}:
        return "a command"
    name = module[1]
    return name if name in RANK else "a command"


def imports_of(path):
    """(line, module) of every import in a file, those inside functions too."""
    mine = module_of(path)
    package = mine if path.name == "__init__.py" else mine[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else ()
            base = (*outer, *(node.module.split(".") if node.module else ()))
            found = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for name in found:
            while name and name not in MODULES:
                name = name[:-1]
            if name[:1] == ("mlx_clex",):
                yield node.lineno, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_one_that_builds_on_it(path):
    """Eight imports ran from command to command, and six files were one circle."""
    mine = room_of(module_of(path))
    for line, module in imports_of(path):
        theirs = room_of(module)
        same_room = mine == theirs != "a command"
        below = RANK[theirs] < RANK[mine]
        assert same_room or below or module == module_of(path), (
            f"{path.relative_to(ROOT)}:{line} ({mine}) imports {'.'.join(module)} ({theirs})"
        )


def test_no_modules_import_each_other():
    """A circle within a room shows as soon as one of its modules is imported first."""
    edges = {module_of(path): {module for _, module in imports_of(path)} for path in FILES}
    state = {}

    def visit(module, trail):
        if state.get(module) == "done":
            return
        assert module not in trail, " -> ".join(".".join(m) for m in (*trail, module))
        for other in edges[module]:
            # `from . import x` names the package; that is no import of what it holds.
            if other != module and other != module[:-1]:
                visit(other, (*trail, module))
        state[module] = "done"

    for module in edges:
        visit(module, ())


def main():
    """Print the order of the rooms, and the lines of each."""
    rooms = {}
    for path in FILES:
        lines = len(path.read_text().splitlines())
        rooms.setdefault(room_of(module_of(path)), []).append((lines, path))
    for names in ORDER:
        for name in names:
            files = rooms.get(name, [])
            total, (most, longest) = sum(n for n, _ in files), max(files)
            print(
                f"{name:12} {len(files):3} files {total:6} lines; longest {most} "
                f"{longest.relative_to(ROOT)}"
            )
    print(f"{'all':12} {len(FILES):3} files {sum(n for f in rooms.values() for n, _ in f):6} lines")


if __name__ == "__main__":
    main()
