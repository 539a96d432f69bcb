"""Torch writes each model once in a test process: what differs between most exports of the suite is ours.

`export` calls torch's exporters, which take most of its time. Here the graph of a model that was exported before, with
the same options, is taken from memory. Tests of the exporters themselves call `export_stock`, which is not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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


def made_once() -> Callable[..., StockExport]:
    """`export_stock`, which exports a model with the same options once."""
    made: dict[tuple[object, ...], tuple[bytes, str]] = {}

    def export(model: Any, *options: Any, **named: Any) -> StockExport:
        key = (fingerprint(model), options, *sorted(named.items()))
        if key not in made:
            stock = export_stock(model, *options, **named)
            made[key] = (stock.model.SerializeToString(), stock.exporter)
        data, exporter = made[key]
        return StockExport(onnx.load_from_string(data), exporter)

    return export
