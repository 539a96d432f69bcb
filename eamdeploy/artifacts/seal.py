"""Seals: a digest inside a file over all that the file means, so that a flipped bit is noticed when the file is read.

A seal covers values and not their spelling: JSON may be indented anew, and tensors may lie in another order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from eamdeploy.errors import CheckpointError

SEAL: Final = "content_digest"
"""The key under which a file holds its own seal."""

_NO_ARRAYS: Mapping[str, NDArray[Any]] = MappingProxyType({})


def seal_of(document: Mapping[str, object], arrays: Mapping[str, NDArray[Any]] = _NO_ARRAYS) -> str:
    """SHA-256 of everything in `document` but its seal, and of the arrays, as `sha256:<64 hex digits>`.

    Hashed are the document as JSON with sorted keys, without spaces and in ASCII, then for every array, by name, the
    JSON list of its name, its dtype's name and its shape, and its bytes in C order.
    """
    sha = hashlib.sha256(_plain({key: value for key, value in document.items() if key != SEAL}))
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(_plain([name, array.dtype.name, list(arrays[name].shape)]))
        sha.update(array.reshape(-1).view(np.uint8).data)
    return f"sha256:{sha.hexdigest()}"


def check_seal(recorded: object, actual: str, where: str, hint: str) -> None:
    """The seal that a file records is that of its contents.

    Raises:
        CheckpointError: it is not, or the file records none; the message names `where`.
    """
    if recorded != actual:
        raise CheckpointError(
            f"{where} was damaged or altered after it was written: its contents don't have the digest that it records",
            expected=f"a {SEAL}" if recorded is None else recorded,
            got=actual,
            hint=hint,
        )


def sealed_json(text: str) -> str:
    """The JSON object `text` with its seal as the last key, indented by 2."""
    document = json.loads(text)
    return json.dumps({**document, SEAL: seal_of(document)}, indent=2, ensure_ascii=False) + "\n"


def opened_json(data: bytes, where: str) -> bytes:
    """The JSON object `data` without its seal, which is that of its contents; JSON without a seal stays as it is.

    Raises:
        CheckpointError: `data` has a seal and is no JSON object, or the seal is not that of its contents.
    """
    if f'"{SEAL}"'.encode() not in data:
        return data
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{where} is no JSON", got=str(err)) from err
    if not isinstance(document, dict) or SEAL not in document:
        return data
    hint = f"Make it again; or, if you changed it on purpose, delete its key {SEAL}."
    check_seal(document.pop(SEAL), seal_of(document), where, hint)
    return json.dumps(document).encode()


def _plain(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
