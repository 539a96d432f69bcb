"""Which module may import which, and what runs where only the base packages are installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
from command_line import COMMANDS
from split_models import copy_reference, split, three_files
from tiny_models import NAME

import eamdeploy
from eamdeploy.artifacts.onnx_files import model_files
from eamdeploy.artifacts.records import Record
from eamdeploy.engines.manifest import Manifest
from eamdeploy.parity.reference_set import reference_path
from eamdeploy.records.diagnosis import Diagnosis
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import Profile
from eamdeploy.stages.inspect import Inspection

ROOT = Path(eamdeploy.__file__).parent

# What everybody uses: these modules at the root of the package may be imported anywhere.
GROUND = {"errors", "observer", "vocabulary"}

# A room may import the rooms that it names, all of which stand above it, and itself: imports go one way.
ROOMS: dict[str, set[str]] = {
    "artifacts": set(),
    "eam": {"artifacts"},
    "graph": {"artifacts"},
    "images": {"artifacts"},
    "devices": {"artifacts"},
    "parity": {"artifacts", "images"},
    "passes": {"eam", "graph"},
    "engines": {"artifacts", "devices", "images", "parity"},
    "convert": {"artifacts", "devices", "engines", "graph", "images", "passes"},
    "lint": {"artifacts", "engines", "graph"},
    "profiling": {"artifacts", "devices", "engines"},
    "records": {"artifacts", "devices", "engines", "parity", "profiling"},
    "host": {
        *("artifacts", "convert", "devices", "eam", "engines", "graph", "images", "parity", "passes"),
        *("profiling", "records"),
    },
    "recovery": {"artifacts", "eam", "host", "images", "parity"},
    "remote": {"artifacts", "devices", "engines", "records"},
    "reporting": {
        *("artifacts", "devices", "eam", "engines", "parity", "profiling", "records", "remote"),
    },
    "stages": {
        *("artifacts", "convert", "devices", "eam", "engines", "graph", "host", "images", "parity", "profiling"),
        *("records", "recovery", "remote", "reporting"),
    },
    "pipeline": {
        *("artifacts", "convert", "devices", "eam", "engines", "host", "images", "parity"),
        *("profiling", "records", "reporting", "stages"),
    },
    "cli": {
        *("artifacts", "convert", "devices", "eam", "engines", "host", "images", "lint", "pipeline"),
        *("profiling", "records", "remote", "reporting", "stages"),
    },
}
# What a board does not run: rooms, and modules of rooms that a board does run.
HOST_ONLY = {
    *("graph", "passes", "host", "recovery", "lint"),
    *("convert.ort", "convert.ort_int8", "convert.trt", "convert.trt_half", "convert.trt_passes"),
    *("stages.analyze", "stages.freeze", "stages.pack", "stages.recover", "stages.export"),
}

# Where a package may be imported: modules, folders of modules, or whole rooms.
PACKAGES: dict[str, set[str]] = {
    "numpy": set(ROOMS),
    "pydantic": {
        *("artifacts", "cli.spread", "devices", "eam", "engines", "host.model", "images.options", "pipeline"),
        *("profiling", "records", "remote", "stages"),
    },
    "PIL": {"images"},
    "psutil": {"devices.machine", "profiling", "stages.doctor"},
    "rich": {"cli"},
    "typer": {"cli"},
    "tomli": {"pipeline.config"},
    "tomllib": {"pipeline.config"},  # Python's own from 3.11
    "onnxruntime": {"convert.ort_tools", "engines.ort", "engines.registry", "graph.model", "graph.running"},
    "torch": {"host", "recovery"},
    "timm": {"host"},
    "onnx": {"convert", "graph", "host", "lint", "passes", "stages.inspect"},
    "onnx_graphsurgeon": {"convert", "graph", "passes"},
    "safetensors": {"eam.checkpoint", "host"},
    "matplotlib": {"reporting.draw"},
    "jinja2": {"reporting.write"},
    "markupsafe": {"reporting.write"},
    "tensorrt": {"engines.trt"},
    "jtop": {"devices.jtop"},
    "pynvml": {"devices.cuda"},
}
BASE = {"numpy", "pydantic", "PIL", "psutil", "rich", "typer", "tomli", "tomllib", "onnxruntime"}
BLOCKED = sorted(PACKAGES.keys() - BASE)
BACKENDS = {"ort", "trt"}

Place = Literal["top", "function", "typing"]


@dataclass(frozen=True)
class Import:
    """`importer` imports `imported`, both without `eamdeploy.` where they are ours."""

    importer: str
    imported: str
    ours: bool
    place: Place

    @property
    def rooms(self) -> tuple[str, str]:
        return room_of(self.importer), room_of(self.imported)

    @property
    def advice(self) -> str:
        """What to import instead."""
        if not self.ours:
            places = ", ".join(f"eamdeploy.{place}" for place in sorted(PACKAGES.get(self.imported, ())))
            return (
                f"{self.importer}: {self.imported} belongs in {places or 'no room yet'}; call a function of that room"
            )
        room, other = self.rooms
        allowed = ", ".join(sorted({*ROOMS.get(room, ()), *GROUND}))
        return (
            f"{self.importer} imports {self.imported}: {room} may import {allowed}. Move what both "
            f"need below {room}, or give it to the function as an argument: {other} stands above or beside."
        )


def room_of(module: str) -> str:
    return module.partition(".")[0]


def may_import(room: str, other: str) -> bool:
    return other in GROUND or other in {room, *ROOMS.get(room, ())}


def lies_in(module: str, places: set[str]) -> bool:
    """Whether `places` names the module, a folder that it lies in, or its room."""
    parts = module.split(".")
    return any(".".join(parts[:length]) in places for length in range(1, len(parts) + 1))


def imports_in(source: str, importer: str) -> Iterator[Import]:
    """Every import of a package that is not Python's own."""
    yield from _imports_below(ast.parse(source), importer, "top")


def _imports_below(node: ast.AST, importer: str, place: Place) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = place
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "function"
        elif isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            inner = "typing"
        for name in _names(child):
            package, _, rest = name.partition(".")
            if package == "eamdeploy":
                yield Import(importer, rest, True, inner)
            elif package not in sys.stdlib_module_names:
                yield Import(importer, package, False, inner)
        yield from _imports_below(child, importer, inner)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0 and node.module is not None, "relative import"
    if (ROOT.parent / Path(*node.module.split("."))).is_dir() and node.module.startswith("eamdeploy"):
        return [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
    return [node.module]


def modules() -> dict[str, Path]:
    """Our modules by name without `eamdeploy.`; packages are left out, as they are empty but for the first."""
    found = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name: path for path, name in sorted(found.items()) if path.name != "__init__.py"}


ALL_IMPORTS = [each for name, path in modules().items() for each in imports_in(path.read_text(), name)]


# --- the source ------------------------------------------------------------------------------------------------------


def test_the_scan_sees_every_kind_of_import() -> None:
    source = (
        "import os, torch.nn\n"
        "from eamdeploy.eam import checkpoint as c\n"
        "from eamdeploy.eam.maps import check_maps\n"
        "from eamdeploy.cli import show\n"
        "if TYPE_CHECKING:\n    import timm\n"
        "class A:\n    def f(self):\n        with x:\n            from onnx import helper\n"
    )
    assert [(each.imported, each.ours, each.place) for each in imports_in(source, "x")] == [
        ("torch", False, "top"),
        ("eam.checkpoint", True, "top"),
        ("eam.maps", True, "top"),
        ("cli.show", True, "top"),
        ("timm", False, "typing"),
        ("onnx", False, "function"),
    ]
    assert len(ALL_IMPORTS) > 200


def test_every_module_belongs_to_a_room_and_rooms_go_one_way() -> None:
    assert {room_of(name) for name in modules()} == {*ROOMS, *GROUND}
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= above, f"{room} imports what comes after it"
        above.add(room)


def test_modules_import_only_the_rooms_they_may() -> None:
    wrong = [each for each in ALL_IMPORTS if each.ours and not may_import(*each.rooms)]
    assert not wrong, "\n".join(each.advice for each in wrong)


def test_the_advice_names_what_may_be_imported() -> None:
    upward = Import("graph.model", "stages.export", True, "top")
    assert "graph may import artifacts, errors, observer, vocabulary" in upward.advice
    package = Import("graph.model", "torch", False, "top")
    assert "torch belongs in eamdeploy.host" in package.advice


def test_every_arrow_of_the_table_is_needed() -> None:
    used = {each.rooms for each in ALL_IMPORTS if each.ours}
    arrows = {(room, other) for room, allowed in ROOMS.items() for other in allowed}
    assert arrows - used == set()


def test_packages_are_imported_only_where_they_may_be() -> None:
    wrong = [
        each for each in ALL_IMPORTS if not each.ours and not lies_in(each.importer, PACKAGES.get(each.imported, set()))
    ]
    assert not wrong, "\n".join(each.advice for each in wrong)


def test_what_a_board_runs_imports_the_host_inside_functions_only() -> None:
    wrong = [
        each
        for each in ALL_IMPORTS
        if each.place == "top"
        and not lies_in(each.importer, HOST_ONLY)
        and ((each.ours and lies_in(each.imported, HOST_ONLY)) or each.imported in BLOCKED)
    ]
    assert not wrong, "\n".join(f"{each.importer} imports {each.imported}: do so inside a function" for each in wrong)


def test_backends_never_import_each_other() -> None:
    folders = {path.name for path in (ROOT / "engines").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == BACKENDS
    for each in ALL_IMPORTS:
        for backend in BACKENDS:
            if each.importer.startswith(f"engines.{backend}."):
                others = {f"engines.{other}" for other in BACKENDS - {backend}} | {"engines.registry"}
                assert not lies_in(each.imported, others), f"{each.importer} imports {each.imported}"
    registry = [each for each in ALL_IMPORTS if each.importer == "engines.registry"]
    assert all(
        each.place == "function"
        for each in registry
        if lies_in(each.imported, {f"engines.{backend}" for backend in BACKENDS})
    )


def test_no_module_is_too_long_to_hold_in_the_head() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_at_the_root_is_only_what_everybody_uses() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", *GROUND}


def test_packages_are_empty_files_but_for_the_lazy_first_one() -> None:
    for path in ROOT.rglob("__init__.py"):
        if path.parent != ROOT:
            assert path.read_text() == "", path
    lazy = list(imports_in((ROOT / "__init__.py").read_text(), "__init__"))
    assert lazy and all(each.place == "typing" for each in lazy)


# --- a board ---------------------------------------------------------------------------------------------------------

BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

DRIVER = """
import contextlib, importlib, io, json, sys

modules, commands = json.load(sys.stdin)
failures = {}
for name in modules:
    try:
        importlib.import_module(f"eamdeploy.{name}")
    except Exception as err:
        failures[name] = repr(err)
from eamdeploy.cli.app import main

outcomes = []
for command in commands:
    sys.argv = ["eamdeploy", *command]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    outcomes.append([code or 0, out.getvalue(), err.getvalue()])
loaded = sorted({name.partition(".")[0] for name in sys.modules})
json.dump({"failures": failures, "outcomes": outcomes, "loaded": loaded}, sys.stdout)
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the base packages only, as have the processes that it starts."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    paths = [str(folder), str(ROOT.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_on(board: dict[str, str], names: list[str], commands: Sequence[Sequence[object]]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=board,
        input=json.dumps([names, [[str(word) for word in command] for command in commands]]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_board_really_lacks_the_host_packages(board: dict[str, str]) -> None:
    program = f"""
for name in {BLOCKED!r}:
    try:
        __import__(name)
    except ModuleNotFoundError as err:
        assert err.name == name
    else:
        raise SystemExit(name)
"""
    host = {"torch", "timm", "onnx", "onnx_graphsurgeon", "safetensors", "matplotlib", "jinja2", "markupsafe"}
    assert host | {"tensorrt", "jtop", "pynvml"} == set(BLOCKED)
    subprocess.run([sys.executable, "-c", program], env=board, check=True)


def test_every_board_module_and_every_help_works_without_the_host_packages(board: dict[str, str]) -> None:
    names = [name for name in modules() if not lies_in(name, HOST_ONLY) and not name.endswith("__main__")]
    result = run_on(board, names, [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
    assert result["failures"] == {}
    for command, (code, out, err) in zip(["", "", *COMMANDS], result["outcomes"], strict=True):
        assert (code, err) == (0, "") and (not command or f"eamdeploy {command}" in out)
    assert not set(BLOCKED) & set(result["loaded"])


def test_a_board_builds_evaluates_profiles_and_inspects(
    board: dict[str, str],
    eam_model: Path,
    eam_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    engine, twin = tmp_path / "x.ort.onnx", tmp_path / "base.ort.onnx"
    base = eam_model.with_name("base.onnx")
    config = tmp_path_factory.mktemp("config") / "run.toml"
    config.write_text(
        f'output = "out"\nmodel = {{name = "{NAME}", weights = "random"}}\ncalibrate = {{data = "{pictures}"}}\n'
    )
    quick = ["--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2]
    commands: dict[str, list[object]] = {
        "build": ["build-ort", eam_model, "-o", engine, "--json"],
        "build twin": ["build-ort", base, "-o", twin],
        "evaluate": ["evaluate", engine, "--reference", twin, "--data", pictures, "--json"],
        "profile": ["profile", engine, "--baseline", twin, *quick, "--json"],
        "inspect": ["inspect", engine, "--json"],
        "inspect reference": ["inspect", reference_path(eam_model), "--json"],
        "doctor": ["doctor", "--json"],
        "wrong engine": ["build-ort", eam_model, "-o", engine, "--reference", reference_path(base), "--no-verify"],
        "freeze": ["freeze", "--model", NAME, "--data", pictures, "-o", tmp_path / "x.eam.safetensors"],
        "analyze": ["analyze", "--model", NAME, "--data", pictures, "-o", tmp_path / "x.json"],
        "pack": ["pack", "--model", NAME, "--maps", tmp_path / "m.npz", "-o", tmp_path / "x.eam.safetensors"],
        "recover": ["recover", eam_checkpoint, "--data", pictures, "-o", tmp_path / "y.eam.safetensors"],
        "run": ["-q", "run", config],
        "export": ["export", eam_checkpoint, "-o", tmp_path / "x.onnx"],
        "evaluate checkpoint": ["evaluate", eam_checkpoint, "--data", pictures],
        "report": ["report", f"{engine}.json", "-o", tmp_path / "report.html"],
        "inspect checkpoint": ["inspect", eam_checkpoint],
    }
    result = run_on(board, [], list(commands.values()))
    outcomes = dict(zip(commands, result["outcomes"], strict=True))
    records: dict[str, type[Record]] = {
        "build": Manifest,
        "evaluate": EvaluationReport,
        "profile": Profile,
        "inspect": Inspection,
        "inspect reference": Inspection,
        "doctor": Diagnosis,
    }
    for name, kind in records.items():
        code, out, err = outcomes[name]
        assert code == 0, (name, err)
        kind.model_validate_json(out)
    parity = Manifest.model_validate_json(outcomes["build"][1]).parity
    assert parity is not None and parity.passed, "the parity gate runs on the board"
    assert outcomes["build twin"][0] == 0
    measured = Profile.model_validate_json(outcomes["profile"][1])
    assert measured.engines[0].memory is not None
    code, out, err = outcomes["wrong engine"]
    assert (code, out) == (3, "") and err.startswith("error: parity of ") and err.count("\n") == 1
    for name, package in (
        *dict.fromkeys(("freeze", "analyze", "pack", "recover", "export", "evaluate checkpoint"), "torch").items(),
        ("run", "timm"),
        ("inspect checkpoint", "safetensors"),
        ("report", "jinja2"),
    ):
        code, out, err = outcomes[name]
        assert (code, out) == (4, ""), (name, err)
        assert err.startswith("error: ") and err.count("\n") == 1
        assert package in err and "eamdeploy[host]" in err
    assert not set(BLOCKED) & set(result["loaded"])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [engine.name, f"{engine.name}.json", twin.name, f"{twin.name}.json"]
    )


def test_a_board_uses_models_of_several_files(
    board: dict[str, str], eam_model: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    path = split(onnx.load(eam_model), folder / eam_model.name, three_files, gap=1)
    copy_reference(eam_model, folder)
    small = "import eamdeploy.artifacts.onnx_files as f; f.ONE_FILE_BYTES = 10_000\n"
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "sitecustomize.py").write_text(BLOCKER + small)
    large = {**board, "PYTHONPATH": os.pathsep.join([str(tmp_path / "large"), board["PYTHONPATH"]])}
    quick = ["--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2, "--sittings", 1]
    for name, machine in (("one.ort.onnx", board), ("two.ort.onnx", large)):
        engine = folder / name
        commands: list[list[object]] = [
            ["build-ort", path, "-o", engine, "--json"],
            ["evaluate", engine, "--reference", path, "--data", pictures, "--json"],
            ["profile", engine, "--baseline", path, *quick, "--json"],
            ["inspect", engine, "--json"],
        ]
        result = run_on(machine, [], commands)
        assert [(code, err) for code, _, err in result["outcomes"] if code] == []
        built, evaluated, profiled, inspected = (json.loads(out) for _, out, _ in result["outcomes"])
        size = sum(file.stat().st_size for file in model_files(engine))
        assert len(model_files(engine)) == (1 if machine is board else 2)
        assert built["parity"]["passed"] and evaluated["agreement"] == 100
        assert built["engine_bytes"] == profiled["engines"][0]["memory"]["engine_bytes"] == inspected["bytes"] == size
        assert not set(BLOCKED) & set(result["loaded"])
