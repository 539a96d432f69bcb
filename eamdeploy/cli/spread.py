"""A command takes a record of options as one argument, and the command line shows each field as an option.

    @spread
    def freeze(context: typer.Context, images: ImageOptions, output: Output) -> None: ...

has the options --data, --split, --images and so on, with the fields' descriptions as help and their defaults. The same
record is a section of the configuration file, so that the two can't differ.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo
from typer.models import ParameterInfo

from eamdeploy.errors import ConfigError


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with every parameter that is a dataclass replaced by parameters for its fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    records: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(hints[name], type):
            records[name] = hints[name]
            parameters |= {each.name: each for each in _fields(hints[name])}
        else:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)

    @functools.wraps(command)
    def spelled_out(**values: Any) -> None:
        made = {name: _make(record, values) for name, record in records.items()}
        command(**made, **values)

    spelled_out.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    spelled_out.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    del spelled_out.__wrapped__  # whose annotations Typer would read
    return spelled_out


def description(record: type, field: str) -> str:
    """What a record of options says of one of its fields."""
    (info,) = (
        each for each in get_args(get_type_hints(record, include_extras=True)[field]) if isinstance(each, FieldInfo)
    )
    return str(info.description)


def _make(record: type, values: dict[str, Any]) -> Any:
    """The record of what was given for its fields, which are taken out of `values`."""
    given = {}
    for field in dataclasses.fields(record):
        value = values.pop(field.name)
        choices = _number_choices(get_type_hints(record)[field.name])
        if choices and value not in choices:
            option = f"--{field.name.replace('_', '-')}"
            raise ConfigError(option, expected=f"one of {', '.join(map(str, choices))}", got=value)
        given[field.name] = value
    return record(**given)


def _fields(record: type) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=_option(field.name, hints[field.name]),
        )
        for field in dataclasses.fields(record)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else field.default_factory()


def _option(name: str, hint: Any) -> Any:
    """The field's type with what the command line says of it."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{name} has no description")
    kind, *extras = get_args(hint)
    if any(isinstance(each, ParameterInfo) for each in extras):
        return hint
    (info,) = (each for each in extras if isinstance(each, FieldInfo))
    if _number_choices(kind):
        kind = int  # Typer's choices are texts
    spelled = f"--{name.replace('_', '-')}"
    return Annotated[kind, typer.Option(spelled, help=info.description)]


def _number_choices(kind: Any) -> tuple[int, ...]:
    """The numbers that a field may have, if it may have some numbers only."""
    choices = get_args(kind)
    return choices if choices and all(type(each) is int for each in choices) else ()
