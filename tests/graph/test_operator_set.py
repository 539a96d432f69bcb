from __future__ import annotations

import onnx
import pytest
from onnx import helper

from eamdeploy.graph.operator_set import operator_set


@pytest.mark.parametrize(
    ("imports", "version"),
    [
        ([("", 17)], 17),
        ([("ai.onnx", 18)], 18),
        ([("com.microsoft", 1), ("", 19)], 19),
        ([("com.microsoft", 5)], 1),
        ([], 1),
    ],
)
def test_the_version_is_that_of_the_standard_operators(imports: list[tuple[str, int]], version: int) -> None:
    assert operator_set(onnx.ModelProto(opset_import=[helper.make_opsetid(*each) for each in imports])) == version
