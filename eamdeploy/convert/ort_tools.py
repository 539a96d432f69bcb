"""Imports ONNX Runtime's own tools for models: its converter to FP16 and its calibrators.

They import each other by bare names like "benchmark" and "fusion_utils", for which their package puts its folder on
Python's search path for good; here it is there only while they are imported.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import onnxruntime

TOOL_FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the tools, which are Python, raise about a model that is not as they expect."""


def import_tool(name: str) -> ModuleType:
    """The module `onnxruntime.<name>`; the search path stays as it was.

    Raises:
        ModuleNotFoundError: it needs a package that is not installed.
    """
    search_path = list(sys.path)
    sys.path.append(str(Path(onnxruntime.__file__).parent / "transformers"))
    try:
        return importlib.import_module(f"onnxruntime.{name}")
    finally:
        sys.path[:] = search_path
