from __future__ import annotations

import onnx_graphsurgeon as gs

from eamdeploy.graph.skip import Refused, Skip, collect


def _positive(number: int) -> str:
    if number < 0:
        raise Refused("it is negative", gs.Node("Neg", name=f"node {number}"))
    return f"+{number}"


def test_a_refused_place_is_a_skip_where_it_stood() -> None:
    earlier = Skip("no number", "elsewhere")
    places: list[int | Skip] = [1, -2, earlier, 3]
    assert collect(places, _positive) == [
        "+1",
        Skip("it is negative", "node -2"),
        earlier,
        "+3",
    ]
    assert collect([], _positive) == []
