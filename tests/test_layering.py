"""Which module may import which, and what runs where only the base packages are installed (DESIGN §6)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
from command_line import COMMANDS
from split_models import copy_reference, split, three_files
from tiny_models import NAME

import eamdeploy
from eamdeploy.diagnosis import Diagnosis
from eamdeploy.engines.base import Manifest
from eamdeploy.evaluation import EvaluationReport
from eamdeploy.inspection import Inspection
from eamdeploy.onnx_files import model_files
from eamdeploy.parity import reference_path
from eamdeploy.profiling.profile import Profile

ROOT = Path(eamdeploy.__file__).parent

# A line may import those above it that it names, and itself; so imports go one way.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "observer": set(),
    "seal": {"errors"},
    "file_kinds": set(),
    "artifact": {"errors", "file_kinds", "seal"},
    "onnx_wire": set(),
    "onnx_files": {"artifact", "errors", "onnx_wire"},
    "npz": {"errors", "file_kinds"},
    "documents": {"errors", "file_kinds", "seal"},
    "run_state": {"artifact"},
    "class_labels": {"errors"},
    "folder": {"artifact", "class_labels", "errors"},
    "images": {"artifact", "errors", "file_kinds", "folder"},
    "source": {"artifact", "class_labels", "errors", "file_kinds", "folder", "images", "observer"},
    "parity": {"artifact", "errors", "npz", "seal"},
    "accuracy": {"artifact", "errors", "folder", "images"},
    "eam": {"artifact", "errors", "file_kinds", "seal"},
    "graph": {"artifact", "errors", "onnx_files", "onnx_wire"},
    "passes": {"eam", "errors", "graph"},
    "devices": {"artifact", "errors"},
    "engines": {"accuracy", "artifact", "devices", "errors", "file_kinds", "images", "onnx_files", "parity"},
    "ort_tools": set(),
    "activation_ranges": {
        *("artifact", "engines", "errors", "folder", "graph", "images", "observer", "onnx_files", "ort_tools"),
        "source",
    },
    "ort_form": {"engines", "errors"},
    "ort_int8": {"errors", "graph", "onnx_files", "ort_tools"},
    "ort_model": {
        *("activation_ranges", "artifact", "errors", "graph", "observer", "onnx_files", "ort_form", "ort_int8"),
        "passes",
    },
    "trt_flavour": {"engines", "graph", "passes"},
    "trt_half": {"engines", "graph", "ort_tools"},
    "trt_model": {
        *("activation_ranges", "artifact", "engines", "errors", "graph", "observer", "onnx_files", "passes"),
        *("trt_flavour", "trt_half"),
    },
    "lint": {"artifact", "engines", "errors", "file_kinds", "graph", "onnx_files"},
    "profiling": {"artifact", "devices", "engines", "errors", "observer", "onnx_files", "parity"},
    "remote": {"artifact", "engines", "errors", "observer", "onnx_files", "profiling"},
    "diagnosis": {"artifact", "devices", "engines", "errors", "profiling"},
    "host": {
        *("accuracy", "artifact", "eam", "engines", "errors", "file_kinds", "folder", "graph", "images", "npz"),
        *("observer", "onnx_files", "parity", "passes", "profiling", "source", "trt_flavour"),
    },
    "ort_build": {
        *("activation_ranges", "artifact", "engines", "errors", "observer", "onnx_files", "ort_form", "ort_model"),
        *("parity", "profiling"),
    },
    "build": {
        *(
            "activation_ranges",
            "artifact",
            "engines",
            "errors",
            "observer",
            "onnx_files",
            "ort_build",
            "ort_form",
            "parity",
        ),
        "trt_model",
    },
    "evaluation": {
        *("accuracy", "artifact", "class_labels", "eam", "engines", "errors", "host", "observer", "onnx_files"),
        "source",
    },
    "inspection": {
        *("artifact", "diagnosis", "documents", "eam", "engines", "errors", "onnx_files", "parity", "profiling"),
        "remote",
    },
    "reporting": {
        *("artifact", "documents", "eam", "engines", "errors", "evaluation", "host", "parity", "profiling"),
        *("remote", "run_state"),
    },
    "run_config": {"artifact", "class_labels", "engines", "errors", "file_kinds", "folder", "ort_form"},
    "run_stage": {"engines", "onnx_files", "run_config", "source"},
    "run_host": {
        *("artifact", "errors", "folder", "host", "observer", "parity", "reporting", "run_config", "run_stage"),
        "source",
    },
    "run_engines": {
        *("activation_ranges", "build", "eam", "engines", "evaluation", "folder", "observer", "onnx_files"),
        *("ort_form", "parity", "profiling", "run_config", "run_stage"),
    },
    "pipeline": {
        *("artifact", "eam", "errors", "evaluation", "observer", "onnx_files", "profiling", "reporting"),
        *("run_config", "run_engines", "run_host", "run_stage", "run_state"),
    },
    "show_profile": {"artifact", "devices", "profiling"},
    "show": {
        *("artifact", "diagnosis", "eam", "engines", "evaluation", "host", "inspection", "lint", "pipeline"),
        *("reporting", "show_profile"),
    },
    "console": {"artifact"},
    "cli_options": {"class_labels", "devices", "eam", "engines", "errors"},
    "cli": {
        *("activation_ranges", "artifact", "build", "cli_options", "console", "diagnosis", "engines", "errors"),
        *("evaluation", "host", "inspection", "lint", "ort_form", "pipeline", "profiling", "remote", "reporting"),
        *("run_config", "show", "show_profile", "source"),
    },
}
HOST_ONLY = {"graph", "passes", "host", "lint", "ort_int8", "ort_model", "trt_flavour", "trt_half", "trt_model"}

# Where a package may be imported: modules, or whole layers.
PACKAGES: dict[str, set[str]] = {
    "numpy": set(LAYERS),
    "pydantic": {
        *("artifact", "devices", "eam", "engines", "host", "inspection", "profiling", "remote"),
        *("run_config", "run_state"),
    },
    "PIL": {"images"},
    "psutil": {"diagnosis", "profiling"},
    "rich": {"cli", "console", "show", "show_profile"},
    "typer": {"cli", "cli_options"},
    "tomli": {"run_config"},
    "tomllib": {"run_config"},  # Python's own from 3.11
    "onnxruntime": {
        *("engines.ort", "engines.ort_providers", "engines.registry", "graph.model", "graph.running", "ort_tools"),
    },
    "torch": {"host"},
    "timm": {"host"},
    "onnx": {
        "activation_ranges",
        "graph",
        "host",
        "inspection",
        "lint",
        "ort_int8",
        "ort_model",
        "passes",
        "trt_flavour",
        "trt_half",
        "trt_model",
    },
    "onnx_graphsurgeon": {"graph", "ort_int8", "ort_model", "passes"},
    "safetensors": {"eam.checkpoint", "host"},
    "matplotlib": {"reporting.heatmap"},
    "jinja2": {"reporting.page"},
    "markupsafe": {"reporting.page"},
    "tensorrt": {"engines.trt"},
    "jtop": {"devices.jtop"},
    "pynvml": {"devices.cuda"},
}
BASE = {"numpy", "pydantic", "PIL", "psutil", "rich", "typer", "tomli", "tomllib", "onnxruntime"}
BLOCKED = sorted(PACKAGES.keys() - BASE)
SHARED = {"__init__", "base", "proof", "provenance", "registry"}
BACKENDS = {path.stem for path in (ROOT / "engines").glob("*.py")} - SHARED

Place = Literal["top", "function", "typing"]


@dataclass(frozen=True)
class Import:
    """`importer` imports `imported`, both without `eamdeploy.` where they are ours."""

    importer: str
    imported: str
    ours: bool
    place: Place

    @property
    def layers(self) -> tuple[str, str]:
        return self.importer.partition(".")[0], self.imported.partition(".")[0]


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
        "from eamdeploy import show\n"
        "if TYPE_CHECKING:\n    import timm\n"
        "class A:\n    def f(self):\n        with x:\n            from onnx import helper\n"
    )
    assert [(each.imported, each.ours, each.place) for each in imports_in(source, "x")] == [
        ("torch", False, "top"),
        ("eam.checkpoint", True, "top"),
        ("eam.maps", True, "top"),
        ("show", True, "top"),
        ("timm", False, "typing"),
        ("onnx", False, "function"),
    ]
    assert len(ALL_IMPORTS) > 200


def test_every_module_belongs_to_a_layer_and_layers_go_one_way() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(LAYERS)
    above: set[str] = set()
    for layer, allowed in LAYERS.items():
        assert allowed <= above, f"{layer} imports what comes after it"
        above.add(layer)


def test_modules_import_only_the_layers_they_may() -> None:
    wrong = [
        each for each in ALL_IMPORTS if each.ours and each.layers[1] not in {each.layers[0], *LAYERS[each.layers[0]]}
    ]
    assert wrong == []


def test_every_arrow_of_the_table_is_needed() -> None:
    used = {each.layers for each in ALL_IMPORTS if each.ours}
    arrows = {(layer, other) for layer, allowed in LAYERS.items() for other in allowed}
    assert arrows - used == set()


def test_packages_are_imported_only_where_they_may_be() -> None:
    wrong = [
        each
        for each in ALL_IMPORTS
        if not each.ours and not PACKAGES.get(each.imported, set()) & {each.importer, each.layers[0]}
    ]
    assert wrong == []


def test_what_a_board_runs_imports_the_host_inside_functions_only() -> None:
    wrong = [
        each
        for each in ALL_IMPORTS
        if each.place == "top"
        and each.layers[0] not in HOST_ONLY
        and ((each.ours and each.layers[1] in HOST_ONLY) or each.imported in BLOCKED)
    ]
    assert wrong == []


def test_backends_import_base_and_never_each_other() -> None:
    """A backend is a file and those whose names go on from its: `trt`, `trt_build`, …"""
    assert {"ort", "trt"} <= BACKENDS
    for each in ALL_IMPORTS:
        importer, imported = (name.removeprefix("engines.") for name in (each.importer, each.imported))
        if importer in BACKENDS and each.imported.startswith("engines."):
            assert imported in ("base", "provenance") or imported.partition("_")[0] == importer.partition("_")[0], each
    registry = [each for each in ALL_IMPORTS if each.importer == "engines.registry"]
    assert all(each.place == "function" for each in registry if each.imported.removeprefix("engines.") in BACKENDS)


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
from eamdeploy.cli import main

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


def run_on(board: dict[str, str], names: list[str], commands: list[list[object]]) -> dict[str, Any]:
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
    names = [name for name in modules() if name.partition(".")[0] not in HOST_ONLY]
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
        "run": ["-q", "run", config],
        "export": ["export", eam_checkpoint, "-o", tmp_path / "x.onnx"],
        "evaluate checkpoint": ["evaluate", eam_checkpoint, "--data", pictures],
        "report": ["report", f"{engine}.json", "-o", tmp_path / "report.html"],
        "inspect checkpoint": ["inspect", eam_checkpoint],
    }
    result = run_on(board, [], list(commands.values()))
    outcomes = dict(zip(commands, result["outcomes"], strict=True))
    records = {
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
        *dict.fromkeys(("freeze", "analyze", "pack", "run", "evaluate checkpoint"), "torch").items(),
        ("export", "onnx"),
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
    small = "import eamdeploy.onnx_files as f; f.ONE_FILE_BYTES = 10_000\n"
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
