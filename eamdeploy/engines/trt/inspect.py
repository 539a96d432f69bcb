"""What TensorRT's engine inspector says about an engine: its layers, fused attention, and where frozen maps went.

The inspector's JSON differs from version to version (`Bindings` or `I/O Tensors`, weights as `weights` or `Weights`,
types as text inside a format); only what all have is relied upon, and an engine of another profiling verbosity, whose
layers are bare names, is read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from eamdeploy.engines.manifest import EngineLayers, FrozenMapLayer
from eamdeploy.engines.trt.request import FrozenMap

_FUSED = "_mha"  # in the name of the layer or of its kernel; source: docs/tensorrt.md, Fused attention
_KERNEL_KEYS = ("Name", "TacticName", "LayerType", "ParameterType")
_FORMATS = ("Format/Datatype", "Format", "Datatype", "DataType")


def inspect_engine(trt: Any, engine: Any, maps: Sequence[FrozenMap]) -> EngineLayers | None:
    """What the engine says about its layers; None where its inspector gives no JSON.

    Args:
        trt: the module tensorrt.
        engine: an ICudaEngine.
    """
    inspector = engine.create_engine_inspector()
    try:
        # 8.6.0 writes the separators of its metadata, control characters, as they are
        document = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON), strict=False)
    except ValueError:
        return None
    layers = document.get("Layers") if isinstance(document, dict) else None
    return None if layers is None else read_layers(layers, maps)


def read_layers(layers: Sequence[Any], maps: Sequence[FrozenMap]) -> EngineLayers:
    """The same from the inspector's list of layers, each a name or an object."""
    described = [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]
    return EngineLayers(
        layers=len(described),
        fused_attention=[str(layer.get("Name")) for layer in described if _is_fused(layer)],
        frozen_maps=[found for item in maps for found in _where(item, described)],
    )


def _is_fused(layer: dict[str, Any]) -> bool:
    return any(_FUSED in str(layer.get(key, "")) for key in _KERNEL_KEYS)


def _where(item: FrozenMap, layers: Sequence[dict[str, Any]]) -> list[FrozenMapLayer]:
    """The layers that name the map or what it goes through; those that hold it as weights alone, if there are such."""
    naming = [layer for layer in layers if _names(item, layer)]
    holding = [layer for layer in naming if _weights_type(layer) is not None or layer.get("LayerType") == "Constant"]
    found = [
        FrozenMapLayer(
            frozen_map=item.name, layer=str(layer.get("Name")), type=_weights_type(layer) or _output_type(layer)
        )
        for layer in holding or naming
    ]
    return found or [FrozenMapLayer(frozen_map=item.name, layer=None, type=None)]


def _names(item: FrozenMap, layer: dict[str, Any]) -> bool:
    tensors = [*_dicts(layer.get("Inputs")), *_dicts(layer.get("Outputs"))]
    told = [
        str(layer.get("Name", "")),
        str(layer.get("Metadata", "")),
        *(str(each.get("Name", "")) for each in tensors),
    ]
    return any(alias in _words(text) for text in told for alias in item.aliases)


def _words(text: str) -> set[str]:
    """Names in a layer's text: TensorRT joins those of fused layers with ` + `, `, ` and brackets."""
    for separator in ("[", "]", "(", ")", "{", "}", ",", " + ", "ONNX Layer: ", "\x1e", "..."):
        text = text.replace(separator, "\n")
    return {word.strip() for word in text.split("\n")}


def _weights_type(layer: dict[str, Any]) -> str | None:
    """The type of the layer's weights, which all versions give as `{"Type": …, "Count": …}` under some key."""
    for value in layer.values():
        if isinstance(value, dict) and "Type" in value and value.get("Count"):
            return str(value["Type"])
    return None


def _output_type(layer: dict[str, Any]) -> str | None:
    for tensor in _dicts(layer.get("Outputs")):
        for key in _FORMATS:
            if key in tensor:
                return str(tensor[key])
    return None


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    return (each for each in value or [] if isinstance(each, dict)) if isinstance(value, list) else iter(())
