"""Records: validated pieces of JSON that stages hand to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from eamdeploy.artifacts.file_kinds import in_words
from eamdeploy.artifacts.files import write_bytes
from eamdeploy.artifacts.seal import opened_json, sealed_json
from eamdeploy.errors import CheckpointError, ConfigError

RecordT = TypeVar("RecordT", bound="Record")


def printable(value: Any) -> Any:
    """`value` with every text in it as UTF-8 can hold it: names of files are bytes, and what is no UTF-8 in them is
    spelled out as `\\udcff`.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(printable, value))
    return value


class Record(BaseModel):
    """An immutable, validated piece of JSON; an unknown or missing key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        return printable(value)

    @classmethod
    def parse(cls: type[RecordT], text: str | bytes, where: str) -> RecordT:
        """The record in `text`.

        Raises:
            CheckpointError: it is no JSON or does not fit; the message names `where` and the key.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as err:
            first = err.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "document"
            data = text.encode(errors="replace") if isinstance(text, str) else text
            raise CheckpointError(
                f"{where} is not a valid {cls.__name__}: {key}: {first['msg']}", got=in_words(data, "json", "text")
            ) from err

    def write(self, path: Path) -> None:
        """`path` holds this record as sealed JSON, or is unchanged if that fails."""
        write_bytes(path, self.sealed())

    def sealed(self) -> bytes:
        """This record as JSON in UTF-8, with its seal (see `seal`) as the last key."""
        return sealed_json(self.model_dump_json()).encode()

    @classmethod
    def read(cls: type[RecordT], path: Path) -> RecordT:
        """The record in the file at `path`; where the file has a seal, the contents are those that were written.

        Raises:
            ConfigError: the file can't be read.
            CheckpointError: its contents don't fit, or not its seal.
        """
        try:
            data = path.read_bytes()
        except OSError as err:
            raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
        return cls.parse(opened_json(data, str(path)), str(path))
