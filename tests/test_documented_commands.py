"""Every command that the documentation shows does what a reader expects of it: it ends well.

The pages are those of this checkout, or of the one that the environment variable DOCUMENTS names.
The commands of a page run in order in one folder. The folder holds `photos/` and
`weights.safetensors`, and for every page but README.md also what the walk through
docs/getting-started.md leaves.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from command_line import Outcome
from documented_commands import Fence, as_run, complaints, documents, fences
from tiny_models import draw_pictures, make_member, save_weights

REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = Path(os.environ.get("DOCUMENTS", REPOSITORY))
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in documents(ROOT)}
WALK = "docs/getting-started.md"
PRODUCTS = (
    *("x.eam.safetensors", "x.onnx", "x.reference.npz", "x.ort.onnx", "x.ort.onnx.json"),
    *("base.onnx", "base.reference.npz", "base.ort.onnx", "base.ort.onnx.json"),
    *("evaluation.json", "profile.json", "report.html"),
)
"""What the guides start from: what the walk leaves behind."""


def to_run(text: str) -> list[tuple[Fence, list[str]]]:
    """The commands of ours in a page that are not excused."""
    return [
        (fence, words)
        for fence in fences(text)
        for words in fence.commands
        if words[0] == "eamdeploy" and not fence.excused
    ]


def run(words: list[str], folder: Path) -> Outcome:
    """A command of ours in that folder, in this process."""
    from eamdeploy.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["eamdeploy", *as_run(words)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return Outcome(int(stopped.value.code or 0), out.getvalue(), err.getvalue())


def run_page(text: str, folder: Path) -> None:
    """All commands of a page have exited as the page says."""
    for fence, words in to_run(text):
        outcome = run(words, folder)
        told = f"line {fence.line}: `{shlex.join(words)}`\n{outcome.out}\n{outcome.err}"
        assert outcome.code == fence.exit_code, told


@pytest.fixture(scope="module", autouse=True)
def quick_tuning() -> Iterator[None]:
    """`--tune` times every form for an instant; no option says so."""
    from eamdeploy.profiling.timing import Schedule, time_sittings

    instant = Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "eamdeploy.stages.ort_forms.time_sittings",
            lambda load, n_calls, _schedule: time_sittings(load, n_calls, instant),
        )
        yield


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader has at the start: weights, and photographs with their labels."""
    folder = tmp_path_factory.mktemp("empty")
    save_weights(make_member("deit"), folder / "weights.safetensors")
    pictures = draw_pictures(folder / "photos", 24)
    rows = [f"{picture.name},{index % 10}" for index, picture in enumerate(pictures)]
    (folder / "photos" / "labels.csv").write_text("\n".join(["file,label", *rows, ""]))
    return folder


@pytest.fixture(scope="module")
def walked(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder at the end of docs/getting-started.md."""
    folder = tmp_path_factory.mktemp("walked") / "folder"
    shutil.copytree(empty, folder)
    run_page((REPOSITORY / WALK).read_text(encoding="utf-8"), folder)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_run_or_excused(page: str) -> None:
    assert complaints(PAGES[page], ROOT) == []


def test_the_walk_leaves_what_the_guides_start_from(walked: Path) -> None:
    assert set(PRODUCTS) <= {path.name for path in walked.iterdir()}


@pytest.mark.parametrize("page", [page for page in PAGES if page != WALK and to_run(PAGES[page])])
def test_the_commands_of_a_page_end_as_it_says(
    page: str, tmp_path: Path, empty: Path, request: pytest.FixtureRequest
) -> None:
    start = empty if page == "README.md" else request.getfixturevalue("walked")
    folder = tmp_path / "folder"
    shutil.copytree(start, folder)
    run_page(PAGES[page], folder)


# --- what finds them -------------------------------------------------------------------------------------------------


def test_commands_are_joined_and_stripped_of_comments_and_prompts() -> None:
    bash = "<!-- exits with 3 -->\n```bash\neamdeploy lint \\\n    'x y.onnx'  # why\n\n# only why\n```\n"
    console = "```console\n$ eamdeploy doctor\nThis machine\n```\n"
    first, second = fences(f"# Title\n\n{bash}\n{console}")
    assert (first.line, first.exit_code, first.excused) == (4, 3, False)
    assert first.commands == [["eamdeploy", "lint", "x y.onnx"]]
    assert second.commands == [["eamdeploy", "doctor"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\neamdeploy doctor\n```\n", "line 1: a command in a fence without a language"),
        ("As in\n\n    make test\n", "line 3: a command that is only indented"),
        ("- as in\n  ```bash\n  x\n", "line 2: a fence of another form"),
        ("<!-- not run: -->\n```bash\neamdeploy doctor\n```\n", "line 2: the note is neither"),
        (
            "```bash\neamdeploy doctor --jsn\n```\n",
            "line 1: `eamdeploy doctor` has no option --jsn",
        ),
        (
            "```bash\neamdeploy diagnose\n```\n",
            "line 1: no command of eamdeploy: eamdeploy diagnose",
        ),
        ("```bash\neamdeploy doctor | less\n```\n", "line 1: a line for a shell"),
        ("```bash\nmake coffee\n```\n", "line 1: the Makefile has no target coffee"),
        ("```bash\npip install '.[hots]'\n```\n", "line 1: eamdeploy has no extra hots"),
        ("```bash\npython models/train.py\n```\n", "line 1: no file models/train.py"),
        ("```bash\nrm -r photos\n```\n", "line 1: `rm` is neither run nor excused"),
        (
            "<!-- not run: a GPU -->\n```bash\neamdeploy profile x --gpu\n```\n",
            "line 2: `eamdeploy profile` has no",
        ),
    ],
    ids=lambda value: value.split("\n")[0][:40],
)
def test_a_command_that_would_escape_is_told(text: str, message: str) -> None:
    (complaint,) = complaints(text, REPOSITORY)
    assert complaint.startswith(message)


def test_a_page_without_complaints() -> None:
    board = "<!-- not run: needs a board -->\n```sh\nscp x.onnx board:\n```\n"
    host = "```bash\nmake PYTHON=python3.12 demo\npip install '.[host,dev]'\n```\n"
    text = f"{board}{host}\n    Softmax of x\n"
    assert complaints(text, REPOSITORY) == []


def test_a_command_that_ends_otherwise_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"line 1: `eamdeploy inspect x\.onnx`"):
        run_page("```bash\neamdeploy inspect x.onnx\n```\n", tmp_path)
