"""Checks the map of the house: a room imports from its own floor or below, and torch above the waterline.

The table below is that map. Rooms of one floor may import each other as long as they form no cycle. What is
imported for types alone counts for floors, not for torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "colossus"

FLOORS = {
    "cli": 7,
    "__main__": 7,
    "api": 6,
    "monitor": 6,
    "launcher": 6,
    "dryrun": 5,
    "trainer": 4,
    "derive": 3,
    "interchange": 3,
    "generation": 3,
    "evaluation": 3,
    "checkpoints": 3,
    "parallel": 3,
    "measure": 2,
    "precision": 2,
    "optim": 2,
    "models": 2,
    "data": 2,
    "planner": 1,
    "perf": 1,
    "architecture": 0,
    "scaling": 0,
    "layout": 0,
    "cuts": 0,
    "job": 0,
    "section": 0,
    "sections": 0,
    "events": 0,
    "errors": 0,
    "words": 0,
    "named": 0,
    "untrusted": 0,
    "hardware": 0,
    "presets": 0,
}
WATERLINE = 1  # rooms up to this floor never import torch
LATE_TORCH = {"data", "monitor", "launcher", "api", "cli", "__main__"}  # only inside functions
FRONT_DOOR = "__init__"  # of the package: a version, and names that are loaded when they are used


@dataclass(frozen=True)
class Import:
    """One import, of a module or of a name from it. late: in a function. types_only: under TYPE_CHECKING."""

    file: Path
    line: int
    module: str
    late: bool
    types_only: bool
    name: str = ""


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file; `from colossus import x` as the module `colossus.x`."""

    def visit(node: ast.AST, late: bool, types_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, inside, types_only)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                whole = module != "colossus"
                for name in [alias.name for alias in child.names]:
                    origin = (module, name) if whole else (f"colossus.{name}", "")
                    yield Import(file, child.lineno, origin[0], inside, types_only, origin[1])
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from visit(ast.Module([statement], []), inside, True)
                for statement in child.orelse:
                    yield from visit(ast.Module([statement], []), inside, types_only)
            else:
                yield from visit(child, inside, types_only)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), False, False)


def room_of(file: Path, package: Path) -> str:
    """`trainer` for colossus/trainer/loop.py, `job` for colossus/job.py."""
    return file.relative_to(package).parts[0].removesuffix(".py")


def faults(package: Path = PACKAGE) -> list[str]:
    """What breaks the map, a line each."""
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        room, name = room_of(file, package), file.relative_to(package.parent)
        if room == FRONT_DOOR:
            continue
        if room not in FLOORS:
            found.append(f"{name}: room {room!r} is on no floor; add it to the map")
            continue
        for item in imports(file):
            first, _, rest = item.module.partition(".")
            where = f"{name}:{item.line}"
            if first == "torch" and not item.types_only:
                if FLOORS[room] <= WATERLINE:
                    found.append(f"{where}: {room} is below the waterline and imports {item.module}")
                elif room in LATE_TORCH and not item.late:
                    found.append(f"{where}: {room} imports {item.module} outside a function")
            if item.module.startswith("."):
                found.append(f"{where}: relative import; write out whose it is")
            target = rest.partition(".")[0]
            if first != "colossus" or target in (room, "", "__version__"):
                continue
            if target not in FLOORS:
                target = "api"  # a public function, offered at the front door
            if FLOORS[target] > FLOORS[room]:
                floors = f"from floor {FLOORS[room]} to floor {FLOORS[target]}"
                found.append(f"{where}: {room} imports {target}: {floors}")
            elif FLOORS[target] == FLOORS[room]:
                graph.setdefault(room, set()).add(target)
    found = list(dict.fromkeys(found))  # several names of one import are one fault
    found += [f"rooms of one floor form a cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]
    return found + [f"files import each other: {' -> '.join(circle)}" for circle in circles(package)]


def circles(package: Path = PACKAGE) -> list[list[str]]:
    """Files that import each other, inside functions too; what is imported for types alone is left out."""
    files = {_module_of(file, package): file for file in sorted(package.rglob("*.py"))}
    graph = {
        module: {
            name if (name := f"{item.module}.{item.name}") in files else item.module
            for item in imports(file)
            if not item.types_only
        }
        - {module}
        for module, file in files.items()
    }
    # Only what both reaches a file and is reached by it lies on a circle with it: few walks are left.
    reached = {module: _reached(graph, module) for module in graph}
    left = {module: {to for to in graph[module] if module in reached.get(to, ())} for module in graph}
    return cycles(left)


def _module_of(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == FRONT_DOOR else parts)


def _reached(graph: dict[str, set[str]], module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for target in graph.get(waiting.pop(), set()) - found:
            found.add(target)
            waiting.append(target)
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A cycle through each room that lies on one, each cycle once."""
    found: dict[frozenset[str], list[str]] = {}

    def walk(path: list[str]) -> None:
        for target in sorted(graph.get(path[-1], ())):
            if target == path[0]:
                found.setdefault(frozenset(path), [*path, target])
            elif target not in path:
                walk([*path, target])

    for room in sorted(graph):
        walk([room])
    return list(found.values())


if __name__ == "__main__":
    lines = faults()
    print("\n".join(lines) or f"floors and waterline hold: {len(FLOORS)} rooms")
    sys.exit(bool(lines))
