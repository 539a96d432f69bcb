"""Names and other texts of an ONNX file: protobuf takes any bytes for one, and everything behind it takes UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx


def has_only_text(model: onnx.ModelProto) -> bool:
    """Whether every text in `model` is UTF-8. Releases of protobuf give bytes for others, or raise."""
    try:
        return all(isinstance(text, str) for text in _texts(model))
    except UnicodeDecodeError:
        return False


def _texts(message: Any) -> Iterator[str | bytes]:
    """The values of all text fields in `message`, however deep."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value
        elif field.type == field.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _texts(each)
