"""How `config.json` and the description of a model say the same: a term for each thing that both say.

A family is a list of terms. Reading puts together what each says of the description; writing what each says
of `config.json`. Keys that no term reads have no effect on the model: the code of its family reads no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from colossus.architecture import Architecture
from colossus.errors import UserError

Config = Mapping[str, Any]
Values = dict[str, Any]
"""Fields of an `Architecture`; those of its tables by dotted names (`experts.num_experts`)."""


class _Required:
    pass


REQUIRED = _Required()


class Term(ABC):
    """One thing that both say."""

    @abstractmethod
    def read(self, config: Config) -> Values:
        """What it says of the description. Raises UserError, naming the key and its value."""

    @abstractmethod
    def write(self, arch: Architecture) -> dict[str, Any]:
        """The keys of config.json."""


@dataclass(frozen=True)
class Key(Term):
    """A key that is a field, or two fields that are always equal there.

    default: what the family takes where the key is missing or null; a function computes it from the rest.
    """

    key: str
    field: str
    default: Any = REQUIRED
    also: str | None = None
    at_least: int | None = None

    def read(self, config: Config) -> Values:
        value = config.get(self.key)
        if value is None:
            value = self.default(config) if callable(self.default) else self.default
        if value is REQUIRED:
            raise UserError(f"config.json has no {self.key}")
        if self.at_least is not None and not (type(value) is int and value >= self.at_least):
            raise UserError.field(self.key, value, f"must be at least {self.at_least}")
        return {self.field: value} | ({self.also: value} if self.also else {})

    def write(self, arch: Architecture) -> dict[str, Any]:
        value = _get(arch, self.field)
        return {} if value is None else {self.key: value}


@dataclass(frozen=True)
class Nullable(Term):
    """A key that is a field, where null says something: what a missing key does not, which is `default`."""

    key: str
    field: str
    default: Any

    def read(self, config: Config) -> Values:
        return {self.field: config.get(self.key, self.default)}

    def write(self, arch: Architecture) -> dict[str, Any]:
        table = self.field.rpartition(".")[0]
        return {} if table and _get(arch, table) is None else {self.key: _get(arch, self.field)}


@dataclass(frozen=True)
class Choice(Term):
    """A key whose values are names for fields. The first of the choices that fits is written."""

    key: str
    choices: Mapping[str, Values]
    default: str

    def read(self, config: Config) -> Values:
        value = config.get(self.key) or self.default
        if value not in self.choices:
            raise UserError.field(
                self.key, value, f"not supported; one of {', '.join(self.choices)}", self.choices
            )
        return dict(self.choices[value])

    def write(self, arch: Architecture) -> dict[str, Any]:
        for value, fields in self.choices.items():
            if all(_get(arch, field) == wanted for field, wanted in fields.items()):
                return {self.key: value}
        return {self.key: self.default}


@dataclass(frozen=True)
class Only(Term):
    """A key that changes the computation, and of which one value is supported: the default."""

    key: str
    value: Any

    def read(self, config: Config) -> Values:
        value = config.get(self.key)
        value = self.value if value is None else value
        if value != self.value or isinstance(value, bool) != isinstance(self.value, bool):
            raise UserError.field(self.key, value, f"not supported; {self.value!r} is")
        return {}

    def write(self, arch: Architecture) -> dict[str, Any]:
        return {self.key: self.value}


@dataclass(frozen=True)
class Always(Term):
    """What every model of the family has, and no key says."""

    fields: Values

    def read(self, config: Config) -> Values:
        return dict(self.fields)

    def write(self, arch: Architecture) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Follows(Term):
    """A field that follows from keys which are fields, too."""

    field: str
    value: Callable[[Config], Any]

    def read(self, config: Config) -> Values:
        try:
            return {self.field: self.value(config)}
        except (KeyError, TypeError) as error:
            raise UserError(f"config.json: no {self.field} follows from it ({error!r})") from None

    def write(self, arch: Architecture) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Says(Term):
    """A key that is written for others, and not read."""

    key: str
    value: Callable[[Architecture], Any]

    def read(self, config: Config) -> Values:
        return {}

    def write(self, arch: Architecture) -> dict[str, Any]:
        return {self.key: self.value(arch)}


@dataclass(frozen=True)
class HeadDim(Term):
    """`head_dim`, by default hidden_size / heads. explicit: written even where it is that."""

    explicit: bool = True
    default: int | None = None

    def read(self, config: Config) -> Values:
        value = config.get("head_dim") or self.default
        if value is None:
            value = whole(config.get("hidden_size"), config.get("num_attention_heads"))
        return {"head_dim": value}

    def write(self, arch: Architecture) -> dict[str, Any]:
        usual = arch.head_dim * arch.num_heads == arch.hidden_size
        return {"head_dim": arch.head_dim} if self.explicit or not usual else {}


def whole(hidden: Any, heads: Any) -> int:
    """The width of a head. Raises UserError where it is no whole number."""
    if type(hidden) is not int or type(heads) is not int or heads < 1 or hidden % heads:
        raise UserError(f"config.json: the width {hidden} over {heads} heads is no width of a head")
    return hidden // heads


@dataclass(frozen=True)
class Dense(Term):
    """`mlp_only_layers`: which layers have an MLP instead of experts; supported are the first so many."""

    def read(self, config: Config) -> Values:
        layers = config.get("mlp_only_layers") or []
        if not isinstance(layers, list) or sorted(layers) != list(range(len(layers))):
            raise UserError.field("mlp_only_layers", layers, "not supported; the first layers, without a gap")
        return {"experts.dense_layers": len(layers)}

    def write(self, arch: Architecture) -> dict[str, Any]:
        return {"mlp_only_layers": list(range(_get(arch, "experts.dense_layers") or 0))}


FULL, WINDOWED = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Window(Term):
    """`sliding_window`, and in which layers.

    default: where the key is missing. switch: there is `use_sliding_window`, false where it is missing.
    layer_types: the family reads them; a function says what they are where they are missing.
    """

    default: int | None
    switch: bool = False
    layer_types: Callable[[Config], list[str]] | None = None

    def read(self, config: Config) -> Values:
        window = config.get("sliding_window", self.default)
        if self.switch and not config.get("use_sliding_window", False):
            window = None
        windowed = [window is not None] * int(config.get("num_hidden_layers") or 0)
        if self.layer_types is not None:
            types = config.get("layer_types") or self.layer_types(config)
            unknown = set(types) - {FULL, WINDOWED}
            if unknown:
                raise UserError.field(
                    "layer_types", min(unknown), f"not supported; {FULL} and {WINDOWED}", (FULL, WINDOWED)
                )
            if len(types) != len(windowed):
                raise UserError(
                    f"layer_types: {len(types)} of them for num_hidden_layers={len(windowed)}; one each"
                )
            windowed = [kind == WINDOWED for kind in types]
            if any(windowed) and window is None:
                raise UserError.field("layer_types", WINDOWED, "needs a sliding_window, which is null")
        if not any(windowed):
            return {"window": None}
        return {"window": window, "full_attention_every": _every(windowed)}

    def write(self, arch: Architecture) -> dict[str, Any]:
        windowed = [arch.is_windowed(layer) for layer in range(arch.num_layers)]
        keys: dict[str, Any] = {"sliding_window": arch.window}
        if self.switch:
            keys["use_sliding_window"] = arch.window is not None
        if self.layer_types is not None:
            keys["layer_types"] = [WINDOWED if w else FULL for w in windowed]
            if self.switch and arch.window is not None:
                keys["max_window_layers"] = 0
        return keys


def _every(windowed: Sequence[bool]) -> int:
    """Every so many-th layer is without a window; 0: none is. Raises UserError for another pattern."""
    for every in range(len(windowed) + 1):
        if all(w == (not every or (layer + 1) % every != 0) for layer, w in enumerate(windowed)):
            return every
    shown = "".join("w" if w else "f" for w in windowed)
    raise UserError.field(
        "layer_types",
        shown,
        f"(f: {FULL}, w: {WINDOWED}) not supported; windows in all layers but every n-th",
    )


def description(terms: Iterable[Term], family: str, config: Config) -> Architecture:
    """The model that `config.json` describes. Raises UserError, naming a key and its value."""
    tree: dict[str, Any] = {"family": family}
    for term in terms:
        for field, value in term.read(config).items():
            table, _, leaf = field.rpartition(".")
            (tree.setdefault(table, {}) if table else tree)[leaf] = value
    try:
        return Architecture.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"config.json: as model.{where}={first['input']!r:.80}: {first['msg']}") from None


def keys(terms: Iterable[Term], arch: Architecture) -> dict[str, Any]:
    """What `config.json` says of a model; nothing of a table that the model lacks."""
    found: dict[str, Any] = {}
    for term in terms:
        found |= term.write(arch)
    return found


def _get(arch: Architecture, field: str) -> Any:
    """A field's value; None where its table is."""
    value: Any = arch
    for part in field.split("."):
        value = None if value is None else getattr(value, part)
    return value
