from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from notebook import Notebook
from tiny_models import KWARGS, NAME, draw_pictures, make_model, save_weights

from eamdeploy import run
from eamdeploy.artifacts import onnx_files
from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.onnx_files import model_files
from eamdeploy.artifacts.run_state import RunState
from eamdeploy.convert.ort_form import AS_EXPORTED
from eamdeploy.convert.ranges import ActivationRanges
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.engines.manifest import Manifest
from eamdeploy.errors import ConfigError
from eamdeploy.graph.model import card_of
from eamdeploy.observer import SILENT
from eamdeploy.parity.reference_set import ReferenceSet
from eamdeploy.pipeline import engines as engine_stages
from eamdeploy.pipeline.config import BuildConfig, RunConfig, load_config
from eamdeploy.pipeline.run import RunReport
from eamdeploy.pipeline.stage import engine_inputs
from eamdeploy.profiling.timing import Schedule
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import Profile
from eamdeploy.reporting.draw import heat_file
from eamdeploy.reporting.records.heat_map import HeatMap
from eamdeploy.stages import ort_forms
from eamdeploy.stages.profile import Extras, profile

STAGES = ["freeze", "export", "build", "evaluate", "profile", "report"]
OUTPUTS = {
    "freeze": ["model.eam.safetensors", "heatmap.png"],
    "export": ["model.onnx", "baseline.onnx", "model.reference.npz", "baseline.reference.npz"],
    "build": ["model.ort.onnx", "baseline.ort.onnx", "model.ort.onnx.json", "baseline.ort.onnx.json"],
    "evaluate": ["evaluation.json"],
    "profile": ["profile.json"],
    "report": ["report.html"],
}
SHOWN = ["model.eam.safetensors", "model.ort.onnx.json", "baseline.ort.onnx.json", "evaluation.json", "profile.json"]

CONFIG = """
output = "out"
[model]
name = "{name}"
weights = "tiny.safetensors"
class_names = "classes.txt"
[model.kwargs]
{kwargs}
[calibrate]
data = "pictures"
split = "even"
[freeze]
sparsity = 0.4
score = "row-entropy"
[export]
batch = "dynamic"
exporter = "torchscript"
[evaluate]
data = "pictures"
split = "odd"
[profile]
threads = 1
warmup_ms = 0.0
min_seconds = 0.0
min_runs = 2
sittings = 1
"""


def make_cheap(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of such a small run's time: processes to measure memory in, and matplotlib."""

    def write(drawn: HeatMap, path: Path) -> None:
        path.write_text(repr(drawn))

    patch.setattr(engine_stages, "profile", partial(profile, extras=Extras(fresh=False, power=False)))
    patch.setattr(heat_file, "write_heat_map", write)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, all that it needs, and `out`, in which it has run once."""
    folder = tmp_path_factory.mktemp("pipeline") / "project"
    folder.mkdir()
    files = draw_pictures(folder / "pictures", 20)
    rows = [f"{file.name},{index % 10}" for index, file in enumerate(files)]
    (folder / "pictures" / "labels.csv").write_text("\n".join(["file,label", *rows]))
    save_weights(make_model(changes={"depth": 1}), folder / "tiny.safetensors")
    (folder / "classes.txt").write_text("\n".join(f"class {index}" for index in range(10)))
    kwargs = "\n".join(f"{key} = {value}" for key, value in {**KWARGS, "depth": 1}.items())
    (folder / "run.toml").write_text(CONFIG.format(name=NAME, kwargs=kwargs))
    with pytest.MonkeyPatch.context() as patch:
        make_cheap(patch)
        report = run(load_config(folder / "run.toml"))
    assert (report.ran, report.reused) == (STAGES, [])
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder; finished as well, as no stage depends on where its files lie."""
    shutil.copytree(finished, tmp_path / "project")
    return tmp_path / "project"


def run_again(project: Path, changes: Mapping[str, Mapping[str, object]] | None = None) -> RunReport:
    """Runs the project's configuration with `changes` to its sections."""
    config = load_config(project / "run.toml")
    document = config.model_dump()
    for section, values in (changes or {}).items():
        document[section] = {**(document[section] or {}), **values}
    return run(RunConfig.model_validate(document))


def ran_before_the_report(project: Path, changes: Mapping[str, Mapping[str, object]] | None = None) -> list[str]:
    """What runs again, but for the report, which must run exactly if a file that it shows is another than before."""

    def shown() -> list[str]:
        return [digest_file(file) if (file := project / "out" / name).exists() else "" for name in SHOWN]

    before = shown()
    ran = run_again(project, changes).ran
    assert ("report" in ran) == (before != shown())
    return [stage for stage in ran if stage != "report"]


# --- one run ---------------------------------------------------------------------------------------------------------


def test_every_stage_leaves_its_files_and_they_hang_together(finished: Path) -> None:
    out = finished / "out"
    assert {file.name for file in out.iterdir()} == {
        "run.json",
        *(name for names in OUTPUTS.values() for name in names),
    }
    checkpoint = checkpoints.load(out / "model.eam.safetensors")
    assert checkpoint.header.class_names == [f"class {index}" for index in range(10)]
    assert checkpoint.header.freezing.score == "row-entropy"
    assert checkpoint.header.calibration is not None and checkpoint.header.calibration.n_images == 10
    assert ReferenceSet.load(out / "model.reference.npz").source == "10 images of pictures"
    for name in ("model", "baseline"):
        manifest = Manifest.read(out / f"{name}.ort.onnx.json")
        assert manifest.model_digest == digest_file(out / f"{name}.onnx")
        assert manifest.parity is not None and manifest.parity.passed and manifest.threads == 1
    evaluation = EvaluationReport.read(out / "evaluation.json")
    assert evaluation.n_images == 10 and evaluation.top1 is not None and evaluation.agreement is not None
    measured = Profile.read(out / "profile.json")
    assert measured.baseline is not None and len(measured.engines) == 1
    assert measured.engines[0].digest == digest_file(out / "model.ort.onnx")
    assert measured.baseline.digest == digest_file(out / "baseline.ort.onnx")


def test_second_run_runs_nothing_and_reports_the_same(finished: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in (finished / "out").iterdir()}
    report = run(load_config(finished / "run.toml"))
    assert (report.ran, report.reused) == ([], STAGES)
    assert {file.name: file.stat().st_mtime_ns for file in (finished / "out").iterdir()} == before
    assert report.freezing == checkpoints.load(finished / "out" / "model.eam.safetensors").header
    assert report.evaluation == EvaluationReport.read(finished / "out" / "evaluation.json")
    assert report.profile == Profile.read(finished / "out" / "profile.json")
    assert set(report.files) == before.keys() - {"run.json"}
    assert RunReport.parse(report.model_dump_json(), "report") == report


def test_where_the_run_lies_and_where_it_is_started_does_not_matter(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert run(load_config(Path("run.toml"))).ran == []
    monkeypatch.chdir(project.parent)
    assert run(load_config(Path("project") / "run.toml")).ran == []


def test_the_stock_export_is_built_and_measured_too_and_is_what_speed_ups_are_against(
    project: Path,
) -> None:
    report = run_again(project, {"export": {"stock": True}})
    assert report.ran == ["export", "build", "evaluate", "profile", "report"]
    out = project / "out"
    stock = onnx.load(out / "stock.onnx")
    card = card_of(stock, "stock")
    assert card is not None and card.rewrites == [] and card.freezing is None
    assert Manifest.read(out / "stock.ort.onnx.json").parity is not None
    measured = Profile.read(out / "profile.json")
    assert measured.baseline is not None
    assert measured.baseline.digest == digest_file(out / "stock.ort.onnx")
    names = ["model.ort.onnx", "baseline.ort.onnx"]
    assert [each.digest for each in measured.engines] == [digest_file(out / name) for name in names]
    assert run_again(project, {"export": {"stock": True}}).ran == []


def test_a_run_with_recovery_compares_with_the_model_before_freezing(project: Path) -> None:
    twin = ReferenceSet.load(project / "out" / "baseline.reference.npz").logits
    report = run_again(project, {"recover": {"held_back": 0.3}})
    assert report.ran == ["freeze", "recover", "export", "build", "evaluate", "profile", "report"]
    out = project / "out"
    before, after = (checkpoints.load(out / f"{name}.eam.safetensors").header for name in ("frozen", "model"))
    assert before.recovery is None and after.recovery is not None and report.freezing == after
    assert after.recovery.teacher == before.content_digest and after.recovery.n_held_back == 3
    np.testing.assert_allclose(ReferenceSet.load(out / "baseline.reference.npz").logits, twin, atol=1e-6)
    assert "recovered (solve)" in (out / "report.html").read_text()
    assert run_again(project, {"recover": {"held_back": 0.3}}).ran == []
    assert run_again(project, {"recover": {"held_back": 0.3, "seed": 5}}).ran[0] == "recover"
    assert run_again(project, {}).ran[0] == "freeze", "model.eam.safetensors is what freeze writes again"


def test_force_runs_everything(project: Path) -> None:
    report = run(load_config(project / "run.toml"), force=True)
    assert (report.ran, report.reused) == (STAGES, [])


# --- what makes a stage run again ------------------------------------------------------------------------------------

FROM_FREEZE, FROM_EXPORT, FROM_BUILD = STAGES[:-1], STAGES[1:-1], STAGES[2:-1]


@pytest.mark.parametrize(
    ("changes", "ran"),
    [
        ({"freeze": {"sparsity": 0.7}}, FROM_FREEZE),
        ({"freeze": {"granularity": "row"}}, FROM_FREEZE),
        ({"freeze": {"window_maps": "class"}}, ["freeze"]),  # a ViT has no windows: the same checkpoint comes out
        ({"freeze": {"seed": 1}}, ["freeze"]),  # row-entropy needs no seed: the same checkpoint comes out
        ({"preprocessing": {"crop_pct": 1.0}}, FROM_FREEZE),
        ({"calibrate": {"images": 7}}, FROM_FREEZE),
        ({"calibrate": {"exif_transpose": True}}, FROM_FREEZE),
        ({"export": {"batch": 1}}, FROM_EXPORT),
        ({"export": {"opset": 18}}, FROM_EXPORT),
        ({"export": {"fold_preprocess": True}}, FROM_EXPORT),
        ({"export": {"without": ["add_position"]}}, FROM_EXPORT),
        ({"build": {"fused_attention": True}}, FROM_BUILD),
        ({"build": {"int8": True, "min_agreement": 0}}, FROM_BUILD),
        ({"build": {"providers": ["cpu"]}}, []),
        ({"evaluate": {"split": "all"}}, ["evaluate"]),
        ({"evaluate": {"images": 5}}, ["evaluate"]),
        ({"evaluate": {"exif_transpose": True}}, ["evaluate"]),
        ({"evaluate": {"class_order": "numbers"}}, ["evaluate"]),
        ({"profile": {"min_runs": 3}}, ["profile"]),
        ({"profile": {"threads": 2}}, ["build", "profile"]),
    ],
    ids=str,
)
def test_one_changed_option_runs_the_stages_that_depend_on_it(
    project: Path, changes: dict[str, dict[str, object]], ran: list[str]
) -> None:
    assert ran_before_the_report(project, changes) == ran
    report = run_again(project, changes)
    assert (report.ran, report.reused) == ([], STAGES)


def redraw(project: Path, index: int) -> None:
    (fresh,) = draw_pictures(project / "fresh", 1, seed=99)
    fresh.replace(project / "pictures" / f"{index:03}.png")


def relabel(project: Path, index: int) -> None:
    table = project / "pictures" / "labels.csv"
    table.write_text(table.read_text().replace(f"{index:03}.png,{index % 10}", f"{index:03}.png,{(index + 1) % 10}"))


def rename_class(project: Path) -> None:
    (project / "classes.txt").write_text("\n".join(f"kind {index}" for index in range(10)))


def other_weights(project: Path) -> None:
    save_weights(make_model(changes={"depth": 1}, seed=5), project / "tiny.safetensors")


@pytest.mark.parametrize(
    ("change", "ran"),
    [
        (partial(redraw, index=4), FROM_FREEZE),
        (partial(redraw, index=5), ["evaluate"]),
        (partial(relabel, index=4), []),
        (partial(relabel, index=5), ["evaluate"]),
        (rename_class, FROM_FREEZE),
        (other_weights, FROM_FREEZE),
    ],
    ids=["calibration picture", "measured picture", "unused label", "label", "class names", "weights"],
)
def test_changed_contents_run_the_stages_that_read_them(
    project: Path, change: Callable[[Path], None], ran: list[str]
) -> None:
    change(project)
    assert ran_before_the_report(project) == ran


def test_a_picture_that_only_export_reads_counts_too(project: Path) -> None:
    """With a limit, export's reference pictures are others than the ones that were frozen on."""
    few = {"calibrate": {"images": 2}}
    run_again(project, few)
    redraw(project, index=18)
    assert run_again(project, few).ran[:1] == ["export"]


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("freeze", "deleted"),
        ("export", "changed"),
        ("build", "deleted"),
        ("build", "changed"),
        ("evaluate", "changed"),
        ("profile", "deleted"),
        ("report", "changed"),
    ],
)
def test_a_touched_output_runs_its_stage(project: Path, stage: str, how: str) -> None:
    for name in OUTPUTS[stage]:
        file = project / "out" / name
        if how == "deleted":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes() + b" ")
    # the stages are deterministic, so those after it find their input unchanged
    report = run_again(project)
    assert [name for name in report.ran if name in (stage, *FROM_FREEZE)] == [stage]


@pytest.mark.parametrize("text", ["", '{"format": 2, "stages": {}}'])
def test_damaged_memory_of_the_run_is_told_and_everything_runs(project: Path, text: str) -> None:
    (project / "out" / "run.json").write_text(text)
    notes = Notebook()
    report = run(load_config(project / "run.toml"), observer=notes)
    assert report.ran == STAGES
    assert "run.json is not a valid RunState" in notes.notes[0] and "every stage runs again" in notes.notes[0]
    assert [text for text in notes.notes if text.endswith(": running")] == [f"{stage}: running" for stage in STAGES]
    assert list(RunState.read(project / "out" / "run.json").stages) == STAGES


def test_a_failed_stage_keeps_what_was_done_and_the_next_run_goes_on(project: Path) -> None:
    shutil.rmtree(project / "out")
    missing = {"evaluate": {"data": project / "missing"}}
    with pytest.raises(ConfigError, match=r"cannot read images from \S*missing"):
        run_again(project, missing)
    assert list(RunState.read(project / "out" / "run.json").stages) == STAGES[:3]
    report = run_again(project)
    assert (report.ran, report.reused) == (STAGES[3:], STAGES[:3])


def test_without_pictures_to_measure_on_there_is_no_evaluation(project: Path) -> None:
    config = load_config(project / "run.toml").model_copy(update={"evaluate": None, "output": project / "new"})
    report = run(config)
    assert report.ran == ["freeze", "export", "build", "profile", "report"]
    assert report.evaluation is None
    assert not (project / "new" / "evaluation.json").exists()


def test_a_stage_that_is_left_out_is_forgotten_and_leaves_the_report(project: Path) -> None:
    page = project / "out" / "report.html"
    assert "Accuracy and agreement" in page.read_text()
    config = load_config(project / "run.toml").model_copy(update={"evaluate": None})
    assert run(config).ran == ["report"]
    assert "evaluate" not in RunState.read(project / "out" / "run.json").stages
    assert "Accuracy and agreement" not in page.read_text()


def test_labels_are_read_as_the_configuration_says(project: Path) -> None:
    """Folders whose names are not the model's: they are told by order, or by a file of other names."""
    pictures = project / "pictures"
    names = [f"animal{index}" for index in range(1, 11)]
    (pictures / "labels.csv").unlink()
    for index, file in enumerate(sorted(pictures.glob("*.png"))):
        folder = pictures / names[index % 10]
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    (project / "animals.txt").write_text("\n".join(names))
    text = (project / "run.toml").read_text()
    top1 = {}
    for asked in ('class_names = "animals.txt"', 'class_order = "natural"', 'class_order = "letters"'):
        (project / "run.toml").write_text(text.replace("[evaluate]", f"[evaluate]\n{asked}"))
        evaluation = run(load_config(project / "run.toml")).evaluation
        assert evaluation is not None
        top1[asked] = evaluation.top5
    by_name, natural, letters = top1.values()
    assert by_name == natural != letters
    (project / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match="have no class's name; expected names such as class 0, class 1, class 2"):
        run(load_config(project / "run.toml"))


def test_class_folders_need_no_names_to_calibrate(project: Path) -> None:
    pictures = project / "pictures"
    (pictures / "labels.csv").unlink()
    for index, file in enumerate(sorted(pictures.glob("*.png"))):
        folder = pictures / f"animal {index % 3}"
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    config = load_config(project / "run.toml").model_copy(update={"evaluate": None})
    assert run(config).ran == ["freeze", "export", "build", "profile", "report"]


def test_output_folder_that_cannot_be_made_is_an_error(project: Path) -> None:
    (project / "file").write_text("")
    config = load_config(project / "run.toml").model_copy(update={"output": project / "file" / "out"})
    with pytest.raises(ConfigError, match=r"cannot make the folder \S*file/out: Not a directory"):
        run(config)


# --- other forms of the engines --------------------------------------------------------------------------------------


def manifests(project: Path) -> list[Manifest]:
    return [Manifest.read(project / "out" / f"{name}.ort.onnx.json") for name in ("model", "baseline")]


def rewrites(manifest: Manifest) -> list[str]:
    """What was done to the exported model."""
    assert manifest.card is not None
    names = ("fused_attention", "dynamic_int8", "quantize_products")
    return [name for name in manifest.card.rewrites if name in names]


def test_model_and_twin_are_built_evaluated_and_profiled_in_the_form_asked_for(project: Path) -> None:
    asked: dict[str, dict[str, object]] = {"build": {"fused_attention": True, "int8": True, "min_agreement": 0}}
    report = run_again(project, asked)
    built = manifests(project)
    assert [rewrites(manifest) for manifest in built] == [["fused_attention", "dynamic_int8"]] * 2
    assert {manifest.parity.tolerance for manifest in built if manifest.parity} == {"reduced-engine at 0 %"}
    assert report.evaluation is not None and report.evaluation.model_digest == built[0].engine_digest
    assert report.profile.engines[0].digest == built[0].engine_digest
    assert report.profile.baseline is not None and report.profile.baseline.digest == built[1].engine_digest
    asked["build"]["min_agreement"] = 1  # another gate for the same files
    assert run_again(project, asked).ran == ["build", "report"]
    asked["build"]["fused_attention"] = False
    assert run_again(project, asked).ran == STAGES[2:]
    assert [rewrites(manifest) for manifest in manifests(project)] == [["dynamic_int8"]] * 2


@pytest.mark.parametrize(("most", "asked", "used"), [(64, None, 10), (4, None, 4), (64, 7, 7)])
def test_static_int8_is_calibrated_with_the_pictures_to_calibrate_on(
    project: Path, monkeypatch: pytest.MonkeyPatch, most: int, asked: int | None, used: int
) -> None:
    monkeypatch.setattr(engine_stages, "CALIBRATION_IMAGES", most)
    changes: dict[str, dict[str, object]] = {
        "build": {"int8": True, "calibrate": True, "min_agreement": 0},
        "calibrate": {"images": asked},
    }
    assert "build" in run_again(project, changes).ran
    assert [rewrites(manifest) for manifest in manifests(project)] == [["quantize_products"]] * 2
    for name in ("model", "baseline"):
        ranges = ActivationRanges.read(project / "out" / f"{name}.ort.onnx.ranges.json")
        assert (ranges.images, ranges.source) == (used, "pictures")
    assert run_again(project, changes).ran == []


@pytest.mark.parametrize(("calibrate", "same"), [(True, False), (False, True)])
def test_pictures_count_for_the_build_where_they_calibrate_it(project: Path, calibrate: bool, same: bool) -> None:
    config = load_config(project / "run.toml")
    config = config.model_copy(update={"build": BuildConfig(int8=True, calibrate=calibrate)})
    before = engine_stages.build_stage(config, SILENT).inputs
    redraw(project, index=4)
    assert (engine_stages.build_stage(config, SILENT).inputs == before) == same


@pytest.mark.parametrize(
    ("fastest", "form"),
    [(0, []), (1, ["fused_attention"]), (3, ["fused_attention", "dynamic_int8"]), (4, ["quantize_products"])],
    ids=["as exported", "fused", "fused INT8", "static INT8"],
)
def test_the_twin_of_a_tuned_model_is_built_in_the_form_that_won(
    project: Path, monkeypatch: pytest.MonkeyPatch, fastest: int, form: list[str]
) -> None:
    """Which of the six wins is a fake; that they are built, timed and named is not."""
    quick = Schedule(warmup_ms=0, min_seconds=0, min_runs=4, sittings=1)
    monkeypatch.setattr(ort_forms, "build", partial(ort_forms.build, schedule=quick))
    monkeypatch.setattr(ort_forms, "fastest", lambda speed_ups: fastest)
    notes = Notebook()
    build = BuildConfig(tune=True, int8=True, calibrate=True, providers=("cpu",), min_agreement=0)
    config = load_config(project / "run.toml").model_copy(update={"build": build})
    # the exported file itself is what the finished run has evaluated and profiled
    assert run(config, observer=notes).ran == (STAGES[2:] if form else ["build", "report"])
    model, twin = manifests(project)
    assert rewrites(model) == rewrites(twin) == form
    assert model.tried is not None and len(model.tried) == 6 and twin.tried is None
    assert sum(text.startswith("timing 6 forms") for text in notes.notes) == 1
    assert any(text.startswith(f"chosen: {model.tried[fastest].form};") for text in notes.notes)
    assert run(config).ran == []


def test_one_file_on_another_provider_is_another_engine(project: Path) -> None:
    config = load_config(project / "run.toml")
    on_cpu = engine_inputs(config)
    for manifest in manifests(project):
        manifest.model_copy(update={"provider": "openvino"}).write(project / "out" / f"{manifest.engine}.json")
    elsewhere = engine_inputs(config)
    assert elsewhere["engines"] == on_cpu["engines"]
    assert "providers" not in on_cpu and elsewhere["providers"] == ["openvino", "openvino"]


def test_the_runtime_is_loaded_to_tell_its_version() -> None:
    """Of several packages that bring the module, only the loaded one knows."""
    code = "from eamdeploy.pipeline.stage import runtime_versions as found; exit('onnxruntime' not in found(['cpu']))"
    hidden = "import importlib.metadata as m; m.version = lambda name: (_ for _ in ()).throw(m.PackageNotFoundError)"
    done = subprocess.run([sys.executable, "-c", f"{hidden}; {code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the configuration -----------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_configuration(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    config = load_config(Path("project") / "run.toml")
    assert (config.output, config.calibrate.data) == (Path("project/out"), Path("project/pictures"))
    assert (config.model.weights, config.model.class_names) == ("project/tiny.safetensors", Path("project/classes.txt"))
    assert config.evaluate is not None and config.evaluate.data == Path("project/pictures")
    assert config.evaluate.class_names is None
    named = (project / "run.toml").read_text().replace("[evaluate]", '[evaluate]\nclass_names = "n.txt"')
    (project / "n.toml").write_text(named)
    config = load_config(Path("project") / "n.toml")
    assert config.evaluate is not None and config.evaluate.class_names == Path("project/n.txt")
    for word in ("random", "pretrained"):
        (project / "w.toml").write_text((project / "run.toml").read_text().replace("tiny.safetensors", word))
        assert load_config(project / "w.toml").model.weights == word


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('output = "out"', "", "output: Field required"),
        ("[calibrate]\ndata", "[calibrate]\nfolder", "calibrate.data: Field required"),
        ("sparsity = 0.4", "sparsty = 0.5", "freeze.sparsty: Extra inputs are not permitted"),
        ("sparsity = 0.4", 'sparsity = "half"', "freeze.sparsity: Input should be a valid number"),
        ('score = "row-entropy"', 'score = "beauty"', "freeze.score: Input should be 'sensitivity'"),
        ("sparsity = 0.4", "bits = 5", "freeze.bits: Input should be 2, 3, 4 or 8"),
        ('batch = "dynamic"', "batch = 0", "export.batch: Input should be greater than or equal to 1"),
        ('batch = "dynamic"', 'batch = "many"', "export.batch: Input should be a valid integer"),
        (
            'split = "odd"',
            'class_order = "size"',
            "evaluate.class_order: Input should be 'names', 'natural', 'letters'",
        ),
        ('split = "even"', 'class_order = "letters"', "calibrate.class_order: Extra inputs are not permitted"),
        ('split = "odd"', 'split = "third"', "evaluate.split: Input should be 'all', 'even' or 'odd'"),
        ("threads = 1", "threads = 0", "profile.threads: Input should be greater than or equal to 1"),
        *(
            ("[profile]", f"[build]\n{keys}\n[profile]", message)
            for keys, message in (
                ("calibrate = true", "build.calibrate: it is of use for INT8 alone"),
                ("min_agreement = 0", "build.min_agreement: it is of use for INT8 alone"),
                ("int8 = true\nmin_agreement = 101", "build.min_agreement: Input should be less than or equal to 100"),
                ("tune = true\nfused_attention = true", "build.tune: tuning tries fused attention too"),
                ('providers = ["cpu", "openvino"]', "build.providers: several providers can only be tried"),
                ('providers = ["openvino"]\nfused_attention = true', "build.providers: provider openvino has no fused"),
                ('providers = ["openvino"]\nint8 = true', "build.providers: no engine in dynamic INT8 is built for"),
                ('providers = ["xnnpack"]\nint8 = true\ntune = true', "build.providers: no form in INT8 can be tried"),
                ('providers = ["tpu"]', "build.providers.0: Input should be 'cpu'"),
                ("providers = []", "build.providers: Tuple should have at least 1 item"),
            )
        ),
        ("[profile]", "[profil]", "profil: Extra inputs are not permitted"),
        ("[profile]", "[profile", "cannot read the configuration"),
    ],
)
def test_mistakes_in_the_configuration_name_the_file_and_the_key(
    finished: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (finished / "run.toml").read_text()
    assert text.count(old) == 1
    (tmp_path / "bad.toml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as err:
        load_config(tmp_path / "bad.toml")
    assert message in str(err.value) and str(tmp_path / "bad.toml") in str(err.value)
    assert "\n" not in str(err.value).partition("TOML")[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"No such file or directory$"),
        (b"\xff", r"it is no text in UTF-8\. It must be TOML in UTF-8"),
        (b"<!DOCTYPE html>", r"it is a web page \(HTML\)\. It must be TOML"),
        (b"version https://git-lfs.github.com/spec/v1", r"it is a Git LFS pointer.* It must be TOML"),
        (b"output = ]", r"[Ii]nvalid value.*line 1.* It must be TOML"),
    ],
)
def test_configuration_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"cannot read the configuration \S*x\.toml: {said}"):
        load_config(tmp_path / "x.toml")


def test_dynamic_is_the_default_batch_and_a_number_is_kept(finished: Path, tmp_path: Path) -> None:
    text = (finished / "run.toml").read_text()
    for new, batch in (('batch = "dynamic"', None), ("", None), ("batch = 3", 3)):
        (tmp_path / "x.toml").write_text(text.replace('batch = "dynamic"', new))
        assert load_config(tmp_path / "x.toml").export.batch == batch


def test_defaults_are_those_of_the_commands(tmp_path: Path) -> None:
    from eamdeploy.eam.options import FreezeOptions

    (tmp_path / "x.toml").write_text('output = "o"\n[model]\nname = "a"\n[calibrate]\ndata = "d"\n')
    config = load_config(tmp_path / "x.toml")
    assert config.freeze == FreezeOptions()
    assert config.build.forms() == [AS_EXPORTED]
    assert json.loads(config.model_dump_json())["profile"] == {
        "threads": None,
        "batch": 1,
        "warmup_ms": 200.0,
        "min_seconds": 3.0,
        "min_runs": 50,
        "sittings": 6,
    }


def test_models_of_two_files_are_remembered_with_both(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 10_000)
    changes: dict[str, dict[str, object]] = {"export": {"batch": 1}}
    assert ran_before_the_report(project, changes) == STAGES[1:-1]
    out = project / "out"
    for name in ("model.onnx", "baseline.onnx", "model.ort.onnx", "baseline.ort.onnx"):
        assert model_files(out / name) == (out / name, out / f"{name}.data")
    assert ran_before_the_report(project, changes) == []
    data = (out / "model.onnx.data").read_bytes()
    (out / "model.onnx.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert ran_before_the_report(project, changes) == ["export"]
    assert (out / "model.onnx.data").read_bytes() == data
    (out / "baseline.ort.onnx.data").unlink()
    assert ran_before_the_report(project, changes) == ["build"], "the same engines come of it"
