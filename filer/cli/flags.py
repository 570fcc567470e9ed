"""Every setting of one volume as a flag, generated from the schema.

Owns how keys and flags are called; values are validated where those of a file are, so that the
same mistake gets the same message.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from filer.cli.configuration import Location, dotted
from filer.settings import (
    CacheSettings,
    NfsSettings,
    NodeSettings,
    ReadAheadSettings,
    VolumeSettings,
    WriteBehindSettings,
)

_VOLUME: Location = ("volumes", 0)

_SECTIONS: tuple[tuple[str, type[BaseModel], Location, str], ...] = (
    ("Volume", VolumeSettings, _VOLUME, ""),
    ("Cache", CacheSettings, (*_VOLUME, "cache"), "cache-"),
    ("Write-behind", WriteBehindSettings, (*_VOLUME, "write_behind"), "write-behind-"),
    ("Read-ahead", ReadAheadSettings, (*_VOLUME, "read_ahead"), "read-ahead-"),
    ("NFS", NfsSettings, ("nfs",), "nfs-"),
    ("Node", NodeSettings, (), ""),
)
"""Title, schema, where its keys are in the configuration, how its flags begin."""

_NAMES: dict[Location, str] = {
    (*_VOLUME, "junction"): "--export",
    ("cache_dir",): "--cache",
}
"""Flags that are not called as their key is."""
_NOT_FLAGS: frozenset[Location] = frozenset(
    {("nfs",), ("volumes",)}
    | {(*_VOLUME, key) for key in ("core", "clients", "cache", "write_behind", "read_ahead")})

CLIENTS: Location = (*_VOLUME, "clients")


class SettingOption(click.Option):
    """A flag that sets the key at *location*."""

    def __init__(self, *names: str, location: Location, section: str, **options: Any) -> None:
        self.location = location
        self.section = section
        super().__init__(list(names), **options)


class SectionedCommand(click.Command):
    """Lists its options under the sections of the schema."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                section = parameter.section if isinstance(parameter, SettingOption) else "Options"
                sections.setdefault(section, []).append(record)
        for title in ("Options", *(title for title, *_ in _SECTIONS)):
            if title in sections:
                with formatter.section(title):
                    formatter.write_dl(sections[title])


def setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: adds a flag for every setting."""
    options = [
        _option(section, model, field_name, (*location, field_name), prefix)
        for section, model, location, prefix in _SECTIONS
        for field_name in model.model_fields
        if (*location, field_name) not in _NOT_FLAGS
    ]
    clients = SettingOption(
        "--client", "setting_clients", location=CLIENTS, section="Volume", multiple=True,
        metavar="NET[:ro|rw][:SQUASH]",
        help="Who may mount, how, and whose ids are squashed (none, root, all); may be given"
             " several times, the first that matches applies.  [default: 0.0.0.0/0:rw:none]")
    params: list[click.Parameter] = function.__dict__.setdefault("__click_params__", [])
    params.extend(reversed([clients, *options]))
    return function


def _option(
    section: str, model: type[BaseModel], name: str, location: Location, prefix: str
) -> SettingOption:
    field = model.model_fields[name]
    flag = _NAMES.get(location) or f"--{prefix}{name.replace('_', '-')}"
    parameter = "setting_" + re.sub(r"\W", "_", dotted(location))
    described = " ".join((field.description or name.replace("_", " ").capitalize() + ".").split())
    help_text = f"{re.sub('[`*]', '', described)}{_default(field)}"
    if _is_bool(field):
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
        return SettingOption(flag, parameter, location=location, section=section,
                             default=None, help=help_text)
    return SettingOption(flag, parameter, location=location, section=section, default=None,
                         metavar=_metavar(name, field), help=help_text)


def _is_bool(field: FieldInfo) -> bool:
    return bool in (field.annotation, *typing.get_args(field.annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default is None:
        return ""
    default = field.default
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, int) and default >= 1 << 20 and default % (1 << 20) == 0:
        shown = f"{default >> 30}GiB" if default % (1 << 30) == 0 else f"{default >> 20}MiB"
    else:
        shown = str(default)
    return f"  [default: {shown}]"


def _metavar(name: str, field: FieldInfo) -> str:
    annotation = field.annotation
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(typing.get_args(annotation))
    if "bytes" in name:
        return "BYTES"
    if name.endswith("_s"):
        return "SECONDS"
    if name.endswith("_dir"):
        return "DIR"
    return {int: "N", float: "X"}.get(typing.cast(type, annotation), "TEXT")


def setting_values(ctx: click.Context) -> dict[Location, Any]:
    """The settings that were given as flags."""
    given: dict[Location, Any] = {}
    for parameter in ctx.command.params:
        if isinstance(parameter, SettingOption):
            value = ctx.params.get(parameter.name or "")
            if value is not None and value != ():
                given[parameter.location] = value
    return given


def client_rules(texts: tuple[str, ...]) -> list[dict[str, str]]:
    """``10.0.0.0/8:ro:root`` → a rule.  IPv6 networks keep their colons: ``fd00::/8:ro``."""
    rules = []
    for text in texts:
        rule: dict[str, str] = {}
        rest, words = text, {"access": ("ro", "rw"), "squash": ("none", "root", "all")}
        while ":" in rest:
            head, _, last = rest.rpartition(":")
            key = next((k for k, allowed in words.items() if last in allowed), None)
            if key is None:
                break
            rule[key], rest = last, head
        rules.append({"clients": rest, **rule})
    return rules


def put(data: dict[str, Any], location: Location, value: Any) -> None:
    """Set *value* at *location*, making the tables on the way."""
    at: Any = data
    for part, following in pairwise(location):
        if isinstance(part, int):
            while len(at) <= part:
                at.append({})
            at = at[part]
        else:
            at = at.setdefault(part, [] if isinstance(following, int) else {})
    at[location[-1]] = value


def flag_name(ctx: click.Context) -> Callable[[Location], str]:
    """How the flag for a key is called, for messages."""
    flags = {p.location: p.opts[0] for p in ctx.command.params if isinstance(p, SettingOption)}
    flags[(*_VOLUME, "core")] = "URL"

    def name(location: Location) -> str:
        if location[: len(CLIENTS)] == CLIENTS:
            return "--client"
        return flags.get(location) or dotted(location)

    return name


def is_volume_setting(location: Location) -> bool:
    return location[:1] == ("volumes",)


def describe(given: Mapping[Location, Any], ctx: click.Context) -> list[str]:
    """The flags in *given*, as typed."""
    name = flag_name(ctx)
    return sorted({name(location) for location in given})
