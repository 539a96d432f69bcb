"""Torch writes each model once in a run of the suite: what differs between most of its exports is ours.

`export` calls torch's exporters, which take most of its time. Here the graph of a model that was
exported before, with the same options, is taken from a folder that all workers share. Tests of the
exporters themselves call `export_stock`, which is not changed.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from eamdeploy.host.stock_export import StockExport, export_stock

_PLAIN = (bool, int, float, str, tuple, type(None))


def fingerprint(model: Any) -> str:
    """SHA-256 of all that a model in torch computes with: modules, their plain attributes, weights and buffers."""
    sha = hashlib.sha256()
    for path, module in model.named_modules():
        plain = {name: value for name, value in sorted(vars(module).items()) if isinstance(value, _PLAIN)}
        sha.update(repr((path, type(module).__qualname__, plain)).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        sha.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def made_once(folder: Path) -> Callable[..., StockExport]:
    """`export_stock`, which exports a model with the same options once; `folder` keeps what it made."""
    folder.mkdir(exist_ok=True)

    def export(model: Any, *options: Any, **named: Any) -> StockExport:
        key = repr((fingerprint(model), options, sorted(named.items())))
        kept = folder / hashlib.sha256(key.encode()).hexdigest()
        if not kept.exists():
            stock = export_stock(model, *options, **named)
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_bytes(pickle.dumps((stock.model.SerializeToString(), stock.exporter)))
            partial.rename(kept)
        data, exporter = pickle.loads(kept.read_bytes())
        return StockExport(onnx.load_from_string(data), exporter)

    return export
