"""Objects that remember which of their attributes were used, and have no others."""

from __future__ import annotations

from typing import Any, ClassVar


class Recording(type):
    """A class whose public attributes, and those of its instances, are noted in `_touched` as `Class.attribute`."""

    _touched: set[str]

    def __getattribute__(cls, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("_") and name != "mro":
            note(cls, name)
        return value


def note(cls: type, name: str) -> None:
    """`name` of that class was used; the class that defines it counts."""
    for each in cls.__mro__:
        if name in each.__dict__ and hasattr(each, "_touched"):
            each._touched.add(f"{each.__name__}.{name}")
            return


class Recorded(metaclass=Recording):
    """Like pybind11's objects: no attributes but the declared ones. Internals begin with an underscore."""

    _touched: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            note(type(self), name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            if not any(name in each.__dict__ for each in type(self).__mro__):
                raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
            note(type(self), name)
        super().__setattr__(name, value)


class Member:
    """A member of an enumeration."""

    def __init__(self, enum: str, name: str, number: int) -> None:
        self.enum, self.name, self.number = enum, name, number

    def __int__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"{self.enum}.{self.name}"


def enum(name: str, members: str, first: int) -> Recording:
    """An enumeration with those members, counted from `first`: versions number them differently."""
    values = {member: Member(name, member, first + index) for index, member in enumerate(members.split())}
    return Recording(name, (Recorded,), values)
