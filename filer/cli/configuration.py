"""Reads a node's configuration and says what is wrong with it, in the operator's words.

Owns TOML, and the translation of validation errors into lines of *key: value is not allowed;
what is*.  The schema is ``filer/settings.py``.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from filer.errors import Misconfigured
from filer.settings import NodeSettings

Location = tuple[int | str, ...]
KeyName = Callable[[Location], str]

_VALUE_CHARACTERS_MAX = 60


class ConfigurationError(Misconfigured):
    """The configuration cannot work; *problems* has one line each."""

    def __init__(self, problems: Sequence[str], hint: str = "") -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems), hint)


def load(path: Path) -> NodeSettings:
    """The validated configuration in the file *path*.  Raises: ConfigurationError."""
    return validated(read_toml(path), source=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Raises: ConfigurationError: it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as exc:
        raise ConfigurationError(
            [f"{path}: {exc.strerror}"], "name the file with --config") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(
            [f"{path}: byte {exc.start} is not UTF-8; TOML must be"]) from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(
            [f"{path}: not valid TOML: {_lower(str(exc))}"],
            "strings need quotes; a volume starts with [[volumes]]") from exc


def dotted(location: Location) -> str:
    """``volumes[0].cache.low_water``"""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def validated(
    data: Mapping[str, Any], *, source: str, key_name: KeyName = dotted
) -> NodeSettings:
    """*data* as settings; *source* and *key_name* say where a value came from.

    Raises: ConfigurationError, with every problem at once.
    """
    try:
        return NodeSettings.model_validate(data)
    except ValidationError as exc:
        prefix = f"{source}: " if source else ""
        raise ConfigurationError(
            [prefix + _problem(error, key_name) for error in _causes(exc.errors())]) from exc


def _causes(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without those that only follow: a list is called too short when its elements are wrong."""
    def is_consequence(error: ErrorDetails) -> bool:
        return error["type"] == "too_short" and any(
            other is not error and other["loc"][: len(error["loc"])] == error["loc"]
            for other in errors)

    return [error for error in errors if not is_consequence(error)]


def _problem(error: ErrorDetails, key_name: KeyName) -> str:
    location = _without_internals(error["loc"])
    key = key_name(location)
    value = error["input"]
    if error["type"] == "missing":
        return f"{key} is missing; {_what_it_is(location)}"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key; {_known_keys(location)}"
    message = _allowed(error, location)
    if error["type"] == "value_error" and isinstance(value, dict | list | tuple):
        # About several keys at once: the message names them and their values.
        return f"{key}: {message}" if key else message
    return f"{key}: {_shown(value)} is not allowed; {message}"


def _allowed(error: ErrorDetails, location: Location) -> str:
    """What would be right, as "must be …"."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be one of {_choices(str(context['expected']))}"
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return _range(location)
    if kind in ("int_parsing", "int_type", "int_from_float", "int_parsing_size"):
        return f"must be a whole number{_in_range(location)}"
    if kind in ("float_parsing", "float_type", "finite_number"):
        return f"must be a number{_in_range(location)}"
    if kind in ("bool_parsing", "bool_type"):
        return "must be true or false"
    if kind in ("string_type", "path_type"):
        return "must be a string"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a table"
    if kind in ("tuple_type", "list_type"):
        return "must be a list of tables"
    if kind == "too_short":
        return "must have at least one entry"
    return f"must satisfy: {_lower(error['msg'])}"


def _choices(expected: str) -> str:
    """pydantic's "'a', 'b' or 'c'" as "a, b, c"."""
    return expected.replace(" or ", ", ").replace("'", "")


def _in_range(location: Location) -> str:
    limits = _range(location)
    return limits.removeprefix("must be") if limits else ""


def _range(location: Location) -> str:
    """"must be between 1 and 65535", by the field's constraints."""
    field = _field(location)
    least: str | None = None
    most: str | None = None
    for limit in field.metadata if field else []:
        for attribute, words in (("ge", "at least {}"), ("gt", "more than {}")):
            if getattr(limit, attribute, None) is not None:
                least = words.format(getattr(limit, attribute))
        for attribute, words in (("le", "at most {}"), ("lt", "less than {}")):
            if getattr(limit, attribute, None) is not None:
                most = words.format(getattr(limit, attribute))
    if least and most and least.startswith("at least") and most.startswith("at most"):
        return f"must be between {least.split()[-1]} and {most.split()[-1]}"
    limits = " and ".join(limit for limit in (least, most) if limit)
    return f"must be {limits}" if limits else ""


def _what_it_is(location: Location) -> str:
    if location == ("volumes",):
        return "every node needs at least one [[volumes]]"
    field = _field(location)
    if field is None or not field.description:
        return "it must be given"
    described = " ".join(re.sub("[`*]", "", field.description).split())
    return f"it must be given: {_lower(described)}"


def _known_keys(location: Location) -> str:
    model = _model(location[:-1])
    known = sorted(model.model_fields) if model is not None else []
    meant = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if meant:
        return f'did you mean "{meant[0]}"?'
    return f"must be one of {', '.join(known)}"


def _model(location: Location) -> type[BaseModel] | None:
    """The model of the table at *location*."""
    model: type[BaseModel] | None = NodeSettings
    for part in location:
        if isinstance(part, int):
            continue  # the field before it already led to the element's model
        field = model.model_fields.get(part) if model is not None else None
        model = _model_in(field.annotation) if field is not None else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _field(location: Location) -> FieldInfo | None:
    model = _model(location[:-1]) if location else None
    return model.model_fields.get(str(location[-1])) if model is not None else None


def _without_internals(location: Location) -> Location:
    """Without the names of validators that pydantic puts in between."""
    return tuple(p for p in location if isinstance(p, int) or p.isidentifier() or "-" in p)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _VALUE_CHARACTERS_MAX else text[:_VALUE_CHARACTERS_MAX] + " …"


def _lower(text: str) -> str:
    """A sentence for the middle of another."""
    return text[:1].lower() + text[1:].rstrip(".") if text[1:2].islower() else text.rstrip(".")
