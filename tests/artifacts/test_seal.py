"""The seal of a file: what it covers, and that no flipped bit of a sealed document goes unnoticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eamdeploy.artifacts.documents import read_document
from eamdeploy.artifacts.records import Record
from eamdeploy.artifacts.run_state import RunState, StageState
from eamdeploy.artifacts.seal import SEAL, opened_json, seal_of, sealed_json
from eamdeploy.errors import CheckpointError, ConfigError

STATE = RunState(stages={"freeze": StageState(inputs="sha256:0a", outputs={"model.é": "sha256:1b"})})

ARRAYS: dict[str, NDArray[Any]] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([True, False]),
    "s": np.array(2.5),
}


def test_seal_is_what_the_documentation_says() -> None:
    sha = hashlib.sha256(b'{"a":[1,0.5,null],"b":"\\u00e9"}')
    sha.update(b'["b","bool",[2]]' + bytes([1, 0]))
    sha.update(b'["s","float64",[]]' + np.array(2.5, "<f8").tobytes())
    sha.update(b'["w","float32",[2,3]]' + np.arange(6, dtype="<f4").tobytes())
    assert seal_of({"b": "é", "a": [1, 0.5, None]}, ARRAYS) == f"sha256:{sha.hexdigest()}"
    assert seal_of({"b": "é", SEAL: "whatever", "a": [1, 0.5, None]}, ARRAYS) == f"sha256:{sha.hexdigest()}"


def test_seal_takes_no_notice_of_order_in_files_or_memory() -> None:
    turned: dict[str, NDArray[Any]] = {
        key: np.asfortranarray(ARRAYS[key]).reshape(ARRAYS[key].shape) for key in reversed(ARRAYS)
    }
    assert seal_of({"a": 1, "b": 2}, turned) == seal_of({"b": 2, "a": 1}, ARRAYS)


@pytest.mark.parametrize(
    "other",
    [
        {**ARRAYS, "w": ARRAYS["w"] + np.float32(1e-6)},
        {**ARRAYS, "w": ARRAYS["w"].reshape(3, 2)},
        {**ARRAYS, "w": ARRAYS["w"].view(np.int32)},
        {**{key: array for key, array in ARRAYS.items() if key != "w"}, "v": ARRAYS["w"]},
        {key: array for key, array in ARRAYS.items() if key != "b"},
        {**ARRAYS, "x": np.zeros(0)},
        {**ARRAYS, "b": ARRAYS["s"], "s": ARRAYS["b"]},
    ],
    ids=["values", "shape", "dtype", "name", "one less", "an empty one more", "swapped"],
)
def test_seal_changes_with_everything_about_the_arrays(other: dict[str, NDArray[Any]]) -> None:
    assert seal_of({}, other) != seal_of({}, ARRAYS)


@given(st.dictionaries(st.text(), st.floats(allow_nan=False) | st.integers() | st.text() | st.none(), max_size=4))
def test_any_document_comes_back_from_its_seal(document: dict[str, object]) -> None:
    document.pop(SEAL, None)
    sealed = sealed_json(json.dumps(document))
    assert list(json.loads(sealed))[-1] == SEAL
    assert json.loads(opened_json(sealed.encode(), "x")) == document


def test_every_flipped_bit_of_a_record_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    STATE.write(path)
    good = path.read_bytes()
    assert RunState.read(path) == STATE and read_document(path) == ("run", STATE.model_dump())
    refused = 0
    for bit in range(0, 8 * len(good), 3):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert RunState.read(path) == STATE
        except CheckpointError as err:
            assert str(path) in str(err)
            refused += 1
        try:
            document = read_document(path)[1]
        except CheckpointError:
            continue
        assert document == STATE.model_dump() or document.keys() != STATE.model_dump().keys()
    assert refused > 0.9 * 8 * len(good) / 3  # the rest is white space


def test_a_sealed_document_may_be_indented_anew_or_reordered(tmp_path: Path) -> None:
    STATE.write(tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_bytes())
    turned = dict(reversed(document.items()))
    (tmp_path / "run.json").write_text(json.dumps(turned, indent="\t"), encoding="utf-8")
    assert RunState.read(tmp_path / "run.json") == STATE


def test_whoever_edits_a_document_deletes_its_seal(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    STATE.write(path)
    document = json.loads(path.read_bytes())
    document["stages"]["freeze"]["inputs"] = "sha256:ff"
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=rf"run\.json was damaged or altered.*delete its key {SEAL}"):
        RunState.read(path)
    del document[SEAL]
    path.write_text(json.dumps(document))
    assert RunState.read(path).stages["freeze"].inputs == "sha256:ff"


@pytest.mark.parametrize("text", [f'["{SEAL}"]', f'{{"a": {{"{SEAL}": 1}}}}', f'"{SEAL}"'])
def test_a_seal_elsewhere_is_none(text: str) -> None:
    assert opened_json(text.encode(), "x") == text.encode()


@pytest.mark.parametrize("text", [f'{{"{SEAL}": ', f'{{"{SEAL}": 1}}', "[" * 100_000 + f'"{SEAL}"'])
def test_a_sealed_document_that_is_no_json_or_has_another_seal(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        RunState.read(tmp_path / "run.json")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_document(tmp_path / "run.json")


def all_records(kind: type[Record] = Record) -> list[type[Record]]:
    return [kind, *(record for child in kind.__subclasses__() for record in all_records(child))]


def test_no_record_has_a_field_that_a_seal_would_hide() -> None:
    import eamdeploy.cli.app
    import eamdeploy.pipeline.run  # noqa: F401

    with_field = {record.__name__ for record in all_records() if SEAL in record.model_fields}
    assert with_field == {"CheckpointHeader"}  # which is in a file of another kind, where it is the seal


def test_missing_files_stay_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        RunState.read(tmp_path / "run.json")
