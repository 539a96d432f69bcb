"""Which kind of document a JSON file of ours holds; told by the keys that only this kind has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from eamdeploy.artifacts.file_kinds import text_in_words
from eamdeploy.artifacts.seal import opened_json
from eamdeploy.errors import CheckpointError, ConfigError

DocumentKind = Literal[
    "engine manifest", "profile", "profiles of machines", "evaluation", "analysis", "export", "run", "diagnosis"
]

_KEYS: Final[dict[DocumentKind, frozenset[str]]] = {
    "engine manifest": frozenset({"engine_digest"}),
    "profile": frozenset({"engines"}),
    "profiles of machines": frozenset({"profiles", "failures"}),
    "evaluation": frozenset({"agreement"}),
    "analysis": frozenset({"scores"}),
    "export": frozenset({"frozen", "baseline"}),
    "run": frozenset({"stages"}),
    "diagnosis": frozenset({"capabilities"}),
}


def read_document(path: Path) -> tuple[DocumentKind | None, dict[str, Any]]:
    """What the JSON file at `path` holds but its seal, by its kind; None for an object of another kind.

    Raises:
        ConfigError: the file can't be read.
        CheckpointError: it holds no JSON, or no object, or was altered after it was written.
    """
    try:
        document: Any = json.loads(opened_json(path.read_bytes(), str(path)).decode())
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} is no JSON: {text_in_words(path, err)}") from err
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is none of our documents", expected="a JSON object")
    return next((kind for kind, keys in _KEYS.items() if keys <= document.keys()), None), document
