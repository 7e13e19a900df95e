"""The job: one typed tree that every verb acts on.

Values come from arguments (`section.field=value`), a job file, presets (`section=NAME`), and what is
planned or derived, in this order of precedence; `origins` says for every value where it came from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from colossus.architecture import Architecture
from colossus.errors import UserError, nearest
from colossus.layout import Layout
from colossus.section import Name, Section
from colossus.sections import Checkpoint, Data, Fleet, Optimizer, Precision, RunSection
from colossus.untrusted import MIB, num_bytes, read_text

Origin = Literal["argument", "file", "preset", "planned", "derived"]
STRONGEST: tuple[Origin, ...] = get_args(Origin)  # first
NOT_ASKED: tuple[Origin, ...] = ("derived", "planned")
KEPT_ORIGINS: tuple[Origin, ...] = (*NOT_ASKED, "preset")  # in a job file; its other values are its own
CHECKED = ("checked_bytes", "checked_memory", "checked_seconds")  # of `Job.made`, where a dry run was made
PREDICTED = ("predicted_step_seconds", "predicted_bytes")  # of `Job.made`, where the layout was planned


SECTIONS: dict[str, type[Section]] = {
    "model": Architecture,
    "data": Data,
    "optimizer": Optimizer,
    "layout": Layout,
    "precision": Precision,
    "checkpoint": Checkpoint,
    "fleet": Fleet,
    "run": RunSection,
}
MESSAGES = {  # of pydantic's kinds of errors, those that would speak of Python instead of the job
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "model_type": "must be a table",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_long": "must have at most {max_length}",
    "too_short": "must have at least {min_length}",
    "tuple_type": "must be a list",
}
MAX_JOB_BYTES = 16 * MIB
LENGTHS = ("run.minutes", "run.steps", "run.tokens")


@dataclass(frozen=True)
class Job:
    """One run, described. A value that is None is derived before anything starts.

    origins: of every dotted field that has a value.
    made: what a resolved job was derived on (processor, version), and what its plan predicts; empty for one
        that a user wrote.
    """

    model: Architecture = field(default_factory=Architecture)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    fleet: Fleet = field(default_factory=Fleet)
    run: RunSection = field(default_factory=RunSection)
    origins: dict[str, Origin] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    def get(self, dotted: str) -> Any:
        """The value of `section.field`."""
        section, name = dotted.split(".")
        return getattr(getattr(self, section), name)

    def asked_for(self, dotted: str) -> bool:
        """Whether the value of `section.field` is the user's, or of a preset that the user named."""
        return self.origins.get(dotted, "derived") not in NOT_ASKED

    def derive(self, origin: Origin = "derived", /, **values: Any) -> Job:
        """A job with `values` ({"run.seed": 0}) where this one has None; what is there stays."""
        return self.put({name: v for name, v in values.items() if self.get(name) is None}, origin)

    def put(self, values: Mapping[str, Any], origin: Origin) -> Job:
        """A job with `values` set, validated."""
        changed: dict[str, dict[str, Any]] = {}
        for dotted, value in values.items():
            section, name = dotted.split(".")
            changed.setdefault(section, {})[name] = value
        sections: dict[str, Any] = {
            section: _validated(section, getattr(self, section).model_dump(exclude_unset=True) | fields)
            for section, fields in changed.items()
        }
        return dataclasses.replace(self, **sections, origins=self.origins | dict.fromkeys(values, origin))

    def asked(self) -> Job:
        """The job without what was planned or derived."""
        found = (name for name in fields() if not self.asked_for(name))
        return dataclasses.replace(self.without(*found), made={})

    def without(self, *names: str) -> Job:
        """The job with these fields open again, as if nobody had given them."""
        sections: dict[str, Any] = {}
        for section in SECTIONS:
            values = getattr(self, section).model_dump(exclude_unset=True, exclude_none=True)
            kept = {name: value for name, value in values.items() if f"{section}.{name}" not in names}
            sections[section] = _validated(section, kept)
        origins = {name: origin for name, origin in self.origins.items() if name not in names}
        return dataclasses.replace(self, **sections, origins=origins)

    def shapes(self, global_batch: int = 0) -> list[tuple[int, int, int]]:
        """(from step, sequences a step, tokens a sequence), where one of these changes before the last step.

        global_batch: of a job without a schedule of batches.
        """
        batches = dict(self.run.batch_schedule or [(0, global_batch)])
        lengths = {phase.from_step: phase.seq_len for phase in self.data.phases or [] if phase.seq_len}
        found, batch, seq_len = [], 0, self.data.seq_len
        for step in sorted({0, *batches, *lengths}):
            if step and self.run.steps is not None and step >= self.run.steps:
                break
            batch, seq_len = batches.get(step, batch), lengths.get(step, seq_len)
            found.append((step, batch, seq_len))
        return found

    def missing(self) -> list[str]:
        """The fields that nobody has filled in yet, but for those that may stay open."""
        return [name for name in fields() if self.get(name) is None and not _may_be_none(name)]

    def differing(self, other: Job) -> list[str]:
        """Fields whose values differ, as `field: ours, theirs`."""
        pairs = ((name, self.get(name), other.get(name)) for name in fields())
        return [f"{name}: {mine!r}, {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


def fields() -> list[str]:
    """Every `section.field` of a job."""
    return [f"{name}.{leaf}" for name, section in SECTIONS.items() for leaf in section.model_fields]


def _may_be_none(dotted: str) -> bool:
    section, name = dotted.split(".")
    return type(None) in get_args(SECTIONS[section].model_fields[name].annotation)


def load_job(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Job:
    """Reads a job file and applies `section.field=value` and `section=PRESET` over it.

    Raises:
        UserError: unknown section, field or preset, a wrong type, two lengths, an unreadable file.
    """
    layers: dict[Origin, dict[str, Any]] = {origin: {} for origin in STRONGEST}
    made: dict[str, str] = {}
    if path is not None:
        tree = _read_toml(Path(path))
        made, origins = _made(tree.pop("made", {})), _origins(tree.pop("origins", {}))
        for section, value in tree.items():
            _check_section(section)
            if isinstance(value, str):
                layers["preset"] |= _preset(section, value)
                continue
            if not isinstance(value, dict):
                raise UserError.field(section, value, "a table of fields, or the name of a preset")
            for name, leaf in value.items():
                if name == "preset" and not made:
                    layers["preset"] |= _preset(section, leaf)
                else:
                    origin = origins.get(f"{section}.{name}", "file")
                    layers[origin].update([_called_now(f"{section}.{name}", leaf)])
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected section.field=value or section=PRESET")
        section, _, leaf = name.partition(".")
        if "" in (parts := name.split(".")) or any(part != part.strip() for part in parts):
            raise UserError(f"{override!r}: expected section.field=value or section=PRESET")
        _check_section(section)
        if "." in leaf:
            _put_inside(layers, name, text)
        elif leaf and leaf != "preset":
            name, text = _called_now(name, text)
            layers["argument"][_known(name)] = _value(name, text)
        else:
            layers["preset"] = {k: v for k, v in layers["preset"].items() if not k.startswith(section + ".")}
            layers["preset"] |= _preset(section, text)
    _one_length(layers)
    job = Job()
    for origin in reversed(STRONGEST):
        job = job.put({_known(name): value for name, value in layers[origin].items()}, origin)
    return dataclasses.replace(job, made=made)


def _called_now(name: str, value: Any) -> tuple[str, Any]:
    """As jobs say it today; those that were begun before `layout.zero` was there said `reshard`."""
    zero = {"True": "3", "true": "3", "False": "1", "false": "1"}.get(str(value))
    if name != "layout.reshard" or zero is None:
        return name, value
    return "layout.zero", zero if isinstance(value, str) else int(zero)


def load_run_job(folder: Path, overrides: Iterable[str] = ()) -> Job:
    """The job of a run. Raises UserError as `load_job`, and where the file is none of the folder's own."""
    path = folder / "job.toml"
    try:
        size = num_bytes(path)
    except OSError as error:
        raise UserError(f"job file {path}: cannot be read ({error.strerror})") from None
    if size > MAX_JOB_BYTES:
        raise UserError(f"job file {path}: cannot be read (longer than any job: {size} bytes)")
    return load_job(path, overrides)


def to_toml(job: Job) -> str:
    """A job as a job file, each value marked with its origin; `load_job` reads it back."""
    lines = ["# What this run follows. A value marked 'derived' or 'planned' was not asked for."]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        for name, value in getattr(job, section).model_dump(exclude_none=True, exclude_unset=True).items():
            origin = job.origins.get(f"{section}.{name}", "derived")
            lines.append(f"{name} = {_toml(value)}  # {origin}")
    lines += ["", "[origins]"]
    for kept in KEPT_ORIGINS:
        names = [n for n in fields() if _is_given(job, n) and job.origins.get(n, "derived") == kept]
        lines.append(f"{kept} = {_toml(names)}")
    if job.made:
        lines += ["", "[made]", *(f"{name} = {_toml(value)}" for name, value in job.made.items())]
    return "\n".join(lines) + "\n"


def _is_given(job: Job, dotted: str) -> bool:
    section, name = dotted.split(".")
    return name in getattr(job, section).model_fields_set and job.get(dotted) is not None


def save_job(job: Job, path: Path) -> None:
    """Writes a resolved job as a job file."""
    path.write_text(to_toml(job), encoding="utf-8")


def preset_names(section: str) -> list[str]:
    """The presets of a section, by name."""
    folder = resources.files("colossus") / "presets" / section
    if not folder.is_dir():
        return []
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def preset_facts(section: str, name: str) -> dict[str, Any]:
    """What is published about a preset, and where: its table `facts`, which is no part of a job."""
    facts: dict[str, Any] = _preset_table(section, name).get("facts", {})
    return facts


def _preset_table(section: str, name: str) -> dict[str, Any]:
    path = resources.files("colossus") / "presets" / section / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _preset(section: str, name: str) -> dict[str, Any]:
    names = preset_names(section)
    if name not in names:
        known = f"one of {', '.join(names)}" if names else f"no presets of {section!r} exist"
        raise UserError.field(section, name, f"no such preset; {known}", names)
    values = {f"{section}.{leaf}": v for leaf, v in _preset_table(section, name).items() if leaf != "facts"}
    if "preset" in SECTIONS[section].model_fields:
        values[f"{section}.preset"] = name
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, MAX_JOB_BYTES, Path(os.path.realpath(path)).parent)  # named, as a link perhaps
        return tomllib.loads(text)
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError.field("job file", str(path), "no such file", siblings) from None
    except OSError as error:
        raise UserError(f"job file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"job file {path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"job file {path}: not TOML ({error})") from None
    except RecursionError:
        raise UserError(f"job file {path}: not TOML that can be read (nested too deeply)") from None


def _made(table: Any) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise UserError.field("made", _toml(table), "a table of names and texts, as a run's job.toml has")
    return table


def _origins(table: Any) -> dict[str, Origin]:
    """Field -> origin, for the fields of which a job file keeps it."""
    if not isinstance(table, dict) or not all(
        name in KEPT_ORIGINS and _is_text(v) for name, v in table.items()
    ):
        allowed = f"a table of {' and '.join(KEPT_ORIGINS)}, each a list of fields"
        raise UserError.field("origins", _toml(table), allowed)
    return {name: origin for origin in table for name in table[origin]}


def _check_section(name: str) -> None:
    if name not in SECTIONS:
        if fields_so := [field for field in fields() if field.endswith(f".{name}")]:
            raise UserError(f"{name}: a field needs its section; {' or '.join(map(repr, fields_so))}")
        raise UserError.field("section", name, f"no such section; one of {', '.join(SECTIONS)}", SECTIONS)


def _known(dotted: str) -> str:
    section, _, name = dotted.partition(".")
    _check_section(section)
    if name not in SECTIONS[section].model_fields:
        names = [f"{section}.{n}" for n in SECTIONS[section].model_fields]
        elsewhere = [n for n in fields() if n.endswith("." + name)]
        if elsewhere:
            raise UserError(f"{dotted}: no such field; did you mean {elsewhere[0]!r}?")
        known, guess = ", ".join(SECTIONS[section].model_fields), nearest(dotted, names)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise UserError(f"{dotted}: no such field; {section} has {known}{hint}")
    return dotted


def _put_inside(layers: dict[Origin, dict[str, Any]], dotted: str, text: str) -> None:
    """`model.experts.num_experts=8`: one value of a table, the others as they are without it."""
    section, name, leaf = dotted.split(".", 2)
    outer = _known(f"{section}.{name}")
    annotation = SECTIONS[section].model_fields[name].annotation
    if get_origin(annotation) is list and _table_of(annotation) is not None:
        raise UserError(f"{dotted}: {outer} is a list of tables; give all of it, as in {outer}=[{{...}}]")
    kind = _table_of(annotation)
    if kind is None:
        raise UserError(f"{dotted}: no such field; {outer} has no fields")
    if "." in leaf:
        raise UserError(f"{dotted}: no such field; {outer}.{leaf.partition('.')[0]} has no fields")
    if leaf not in kind.model_fields:
        raise _no_such_leaf(outer, leaf, kind)
    strongest = (layers[origin].get(outer) for origin in ("argument", "file", "preset"))
    table = next((table for table in strongest if isinstance(table, dict)), {})
    layers["argument"][outer] = table | {leaf: _parsed(dotted, text, kind.model_fields[leaf].annotation)}


def _table_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or holds several of; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((kind for kind in map(_table_of, get_args(annotation)) if kind is not None), None)


def _no_such_leaf(outer: str, leaf: str, kind: type[Section]) -> UserError:
    """Of a table inside a field."""
    guess = nearest(f"{outer}.{leaf}", [f"{outer}.{known}" for known in kind.model_fields])
    hint = f"; did you mean {guess!r}?" if guess else ""
    return UserError(f"{outer}.{leaf}: no such field; {outer} has {', '.join(kind.model_fields)}{hint}")


def _value(dotted: str, text: str) -> Any:
    """The value that `text` says for a field."""
    section, _, name = _known(dotted).partition(".")
    return _parsed(dotted, text, SECTIONS[section].model_fields[name].annotation)


def _parsed(dotted: str, text: str, kind: Any) -> Any:
    """A TOML value where `text` is one that fits the kind, else the text itself; of texts in a list, too.

    Raises:
        UserError: a list or table whose brackets do not match, or which is no TOML.
    """
    try:
        (value,) = tomllib.loads(f"value = {text}", parse_float=_finite).values()
    except ValueError as error:  # no TOML, or more than one value
        may_be_list = text.startswith("[") if kind == list[Name] else _has_parts(kind)
        if may_be_list and (wrong := _brackets(text)):
            raise UserError(f"{dotted}={text}: {wrong}") from None
        if may_be_list and kind != list[Name] and text.startswith(("[", "{")):
            raise UserError(f"{dotted}={text}: not TOML ({str(error).partition(' (at ')[0]})") from None
        if kind == list[Name] and text.startswith("[") and text.endswith("]"):
            return [item.strip() for item in text[1:-1].split(",")]
        return text
    takes_text = kind in (str, list[Name])
    return text if takes_text and not _is_text(value) else value


def _has_parts(kind: Any) -> bool:
    """Whether a value of this kind is a list or a table."""
    is_one = get_origin(kind) in (list, tuple) or _table_of(kind) is not None
    return is_one or any(map(_has_parts, get_args(kind)))


def _brackets(text: str) -> str:
    """What is wrong with the brackets and quotes of a list or table; nothing where they match."""
    closing, awaited, quote = {"[": "]", "{": "}"}, "", ""
    for place, letter in enumerate(text, 1):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not text[max(0, place - 2)].isalnum():  # else an apostrophe
            quote = letter
        elif letter in closing:
            awaited = closing[letter] + awaited
        elif letter in closing.values():
            if not awaited:
                return (
                    f"{letter!r} at place {place} closes nothing; one too many, or its opening one is missing"
                )
            if letter != awaited[0]:
                return f"{letter!r} at place {place}, where {awaited[0]!r} is expected"
            awaited = awaited[1:]
    if quote:
        return f"{quote} is opened and never closed"
    return f"{awaited!r} is missing at the end" if awaited else ""


def _finite(text: str) -> float | str:
    """A number; one that is not finite as it was written, so that the error shows it so."""
    return text if _is_infinite(text) else float(text)


def _is_infinite(text: str) -> bool:
    """Whether a text is a number and not finite."""
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return False


def _is_text(value: Any) -> bool:
    """Whether `value` is a string or a list of them."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _one_length(layers: dict[Origin, dict[str, Any]]) -> None:
    """Of minutes, steps and tokens the strongest origin decides; two of one origin contradict."""
    for origin in STRONGEST:
        given = [name for name in LENGTHS if name in layers[origin]]
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)}: give one of {', '.join(LENGTHS)}; the others follow from it"
            )
        if given:
            for other in layers.values():
                for name in LENGTHS:
                    if name not in given:
                        other.pop(name, None)
            return


def _validated(section: str, values: dict[str, Any]) -> Section:
    try:
        return SECTIONS[section].model_validate(values)
    except ValidationError as error:
        # One message for a field: of a table, what is not known comes before what is missing for it.
        details = sorted(error.errors(), key=lambda detail: detail["type"] == "missing")
        first = {detail["loc"][:1]: detail for detail in reversed(details)}
        raise UserError("\n".join(_explain(section, first[field]) for field in reversed(first))) from None


def _explain(section: str, detail: Any) -> str:
    where = ".".join(str(part) for part in (section, *detail["loc"]))
    if detail["type"] == "extra_forbidden":  # of a table inside a field; fields themselves are known by now
        kind = _table_of(SECTIONS[section].model_fields[detail["loc"][0]].annotation)
        assert kind is not None
        outer, _, leaf = where.rpartition(".")
        return str(_no_such_leaf(outer, leaf, kind))
    if detail["type"] == "missing":
        return f"{where}: must be given"
    shown = detail["input"] if isinstance(detail["input"], str) else _toml(detail["input"])
    if detail["type"] == "literal_error":
        allowed = detail["ctx"]["expected"]
        options = [option.strip(" '") for option in allowed.replace(" or ", ",").split(",")]
        return str(UserError.field(where, shown, f"must be {allowed}", options))
    said = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = MESSAGES.get(detail["type"], said[:1].lower() + said[1:])
    if detail["type"] == "int_parsing" and _is_infinite(shown):
        message = "must be a finite number"
    return str(UserError.field(where, shown, message.format(**detail.get("ctx", {}))))


def _toml(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    return "[" + ", ".join(_toml(item) for item in value) + "]"
