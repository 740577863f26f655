"""Settings that choose among classes: `{ kind = "uniform", count = 3 }` is read as `Uniform(count=3)`."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cached_property
from types import NoneType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, create_model
from pydantic_core import CoreSchema, core_schema

STRICT = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=True)


@dataclass(frozen=True, eq=False)
class OneOf:
    """Stands beside a field's type in `Annotated`: the field holds an instance of one of these dataclasses.

    Written `{ tag = name, options... }`, or as the name alone; without a name, the first of the table is
    meant. The options are the fields of the class, except functions; `nested` gives the types of those that
    are choices too.
    """

    tag: str  # the key that holds the name: "name", "kind"
    table: Mapping[str, type]  # name -> class, each class once
    nested: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # another name -> its name in the table

    def name(self, made: object) -> str:
        """The name that an instance's class has in settings."""
        return next(name for name, cls in self.table.items() if cls is type(made))

    def canonical(self, name: Any) -> str:
        """The name in the table that a name or an alias stands for; "" for anything that is not a name."""
        return self.aliases.get(name, name) if isinstance(name, str) else ""

    def named(self, raw: Any) -> tuple[str, dict[str, Any]]:
        """The name, with aliases resolved, and the options. Raises: ValueError."""
        options = dict(raw) if isinstance(raw, Mapping) else {self.tag: raw}
        said = options.pop(self.tag, next(iter(self.table)))
        name = self.canonical(said)
        if name not in self.table:
            hint = did_you_mean(str(said), [*self.table, *self.aliases])
            raise ValueError(f"expected {self.tag} = one of {', '.join(self.table)}; got {said!r}{hint}")
        return name, options

    def options(self, name: str) -> dict[str, Any]:
        """Options of the class with this name -> their types."""
        hints = typing.get_type_hints(self.table[name], include_extras=True)
        own = {f.name: self.nested.get(f.name, hints[f.name]) for f in fields(self.table[name])}
        return {key: hint for key, hint in own.items() if typing.get_origin(hint) is not FUNCTION}

    def read(self, raw: Any) -> Any:
        """The instance that a TOML value describes; an instance is returned as it is. Raises: ValueError."""
        if type(raw) in self.table.values():
            if self.read(self.plain(raw)) != raw:
                raise ValueError(
                    "expected plain values only: a function of your own cannot be written to TOML"
                )
            return raw
        name, options = self.named(raw)
        checked = self._schemas[name].model_validate(options)
        return self.table[name](**dict(checked))  # the class has checks of its own

    def plain(self, made: Any) -> dict[str, Any]:
        """The inverse of `read`, with every default written out."""
        name = self.name(made)
        schema = self._schemas[name]
        values = schema.model_construct(**{key: getattr(made, key) for key in schema.model_fields})
        return {self.tag: name, **values.model_dump(mode="json")}

    @cached_property
    def _schemas(self) -> dict[str, type[BaseModel]]:
        return {
            name: create_model(
                cls.__name__,
                __config__=STRICT,
                **{key: (hint, _default(cls, key)) for key, hint in self.options(name).items()},
            )  # type: ignore[call-overload]
            for name, cls in self.table.items()
        }

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.read, serialization=core_schema.plain_serializer_function_ser_schema(self.plain)
        )


FUNCTION = typing.get_origin(Callable[..., Any])


def _default(cls: type, key: str) -> Any:
    its: Field[Any] = next(f for f in fields(cls) if f.name == key)
    if its.default_factory is not MISSING:
        return its.default_factory()
    return ... if its.default is MISSING else its.default


def choice_of(hint: Any) -> OneOf | None:
    """The choice that a type stands for; None where it is not a choice."""
    return next((m for m in getattr(_present(hint), "__metadata__", ()) if isinstance(m, OneOf)), None)


def keys(hint: Any, raw: Any) -> dict[str, Any]:
    """Key -> type for every key this section may hold, given `raw`; {} where the type is not a section."""
    choice, hint = choice_of(hint), _present(hint)
    if choice is not None:
        try:
            name, _ = choice.named(raw)
        except ValueError:
            return {choice.tag: str}
        return {choice.tag: str, **choice.options(name)}
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is dict:
        return dict.fromkeys(raw, typing.get_args(hint)[1]) if isinstance(raw, Mapping) else {}
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        known = list(hint.model_fields)
    elif isinstance(hint, type) and is_dataclass(hint):
        known = [f.name for f in fields(hint)]
    else:
        return {}
    hints = typing.get_type_hints(hint, include_extras=True)
    return {key: hints[key] for key in known}


def _present(hint: Any) -> Any:
    """An optional type without its None."""
    left = [t for t in typing.get_args(hint) if t is not NoneType]
    return left[0] if NoneType in typing.get_args(hint) and len(left) == 1 else hint


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
