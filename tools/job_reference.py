"""Keeps docs/job.md in step with the job: `python tools/job_reference.py [--check]`.

The page has a row for every field: its name, the values it takes, what it is, what holds where it is left
out. A field that is a table is followed by a row for each of its own. The second column is written here, from
the types of the job; the others are written by hand.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from colossus.job import SECTIONS, fields  # noqa: E402
from colossus.section import Section  # noqa: E402
from colossus.sections import Names, Pair, Weights  # noqa: E402

PAGE = ROOT / "docs" / "job.md"
ROW = re.compile(r"^\| `(\w+(?:\.\w+){1,2})` \|([^|]*)\|(.*)$")
TODO = "| to be written | to be written |"
SHOWN_LIMIT = 10_000  # an upper bound beyond it only keeps out absurd values
KINDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    list[Pair]: "list of pairs of whole numbers",
    get_args(Names)[0]: "text, or a list of texts",
    get_args(Weights)[0]: "number, or a list of numbers",
}


def names() -> list[str]:
    """The fields that have a row, in their order."""
    found = []
    for name in fields():
        kind = _plain(_field(name).annotation)
        found += [name, *(f"{name}.{leaf}" for leaf in kind.model_fields)] if _is_table(kind) else [name]
    return found


def _field(name: str) -> FieldInfo:
    section, leaf, *inside = name.split(".")
    field = SECTIONS[section].model_fields[leaf]
    return _plain(field.annotation).model_fields[inside[0]] if inside else field


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def values(field: FieldInfo) -> str:
    """The values that a field takes, in words."""
    kind = _plain(field.annotation)
    if get_origin(kind) is Literal:
        return " or ".join(f'`"{value}"`' for value in get_args(kind))
    if _is_table(kind):
        return "table of " + ", ".join(f"`{name}`" for name in kind.model_fields)
    if get_origin(kind) is list and isinstance(get_args(kind)[0], type):
        return "list of tables of " + ", ".join(f"`{name}`" for name in get_args(kind)[0].model_fields)
    return KINDS[kind] + (_bounds(field) if kind in (int, float) else "")


def _plain(annotation: Any) -> Any:
    """A type without `| None` and without what is annotated."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (a for a in get_args(annotation) if a is not type(None))
        return _plain(annotation)
    return _plain(get_args(annotation)[0]) if hasattr(annotation, "__metadata__") else annotation


def _bounds(field: FieldInfo) -> str:
    words = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    found = []
    for constraint in field.metadata:
        for name, text in words.items():
            limit = getattr(constraint, name, None)
            if limit is not None and limit <= SHOWN_LIMIT:
                found.append(text.format(f"{limit:,}"))
    return "".join(f", {bound}" for bound in found)


def updated(page: str) -> str:
    """The page with its second column as the job has it; a row is added where a field has none."""
    known, seen = names(), set[str]()
    lines: list[str] = []
    for line in page.splitlines():
        row = ROW.match(line)
        if row is not None and row[1] in known:
            seen.add(row[1])
            line = f"| `{row[1]}` | {values(_field(row[1]))} |{row[3]}"
        elif row is not None:
            continue  # of a field that is no more
        lines.append(line)
    for name in known:
        if name not in seen:
            of_section = [i for i, line in enumerate(lines) if line.startswith(f"| `{name.split('.')[0]}.")]
            lines.insert(of_section[-1] + 1 if of_section else len(lines), _new_row(name))
    return "\n".join(lines) + "\n"


def _new_row(name: str) -> str:
    return f"| `{name}` | {values(_field(name))} {TODO}"


def main(arguments: list[str]) -> int:
    """Writes the page; with --check says whether it would change. Returns an exit code."""
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page)
    if "--check" in arguments:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
