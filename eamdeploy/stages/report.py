"""The stage that shows what was frozen, what it cost and what it gained, from the files of the other stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eamdeploy.artifacts.files import require_output, write_bytes
from eamdeploy.artifacts.records import Record
from eamdeploy.errors import ConfigError
from eamdeploy.reporting.records.sources import read_sources
from eamdeploy.reporting.write.content import gather
from eamdeploy.reporting.write.markdown import write_markdown
from eamdeploy.reporting.write.page import render


class Report(Record):
    """What was written.

    Attributes:
        page, markdown: the files; `markdown` is None where it was not asked for.
        models: what the report is about.
        caveats: everything in the records that makes a figure doubtful.
        files: what it was made of, those that a `run.json` names among them.
    """

    page: str
    markdown: str | None
    title: str
    models: list[str]
    caveats: list[str]
    files: list[str]


def report(
    files: Sequence[Path],
    output: Path,
    *,
    markdown: Path | None = None,
    title: str | None = None,
    verify: bool = True,
) -> Report:
    """`output` is one HTML page about the records in the files, and `markdown` the same as Markdown.

    The same files give the same bytes.

    Args:
        files: EAM checkpoints and JSON of analyze, export, build-ort, build-trt, evaluate, profile and run; a
            `run.json` stands for all that its stages wrote.
        title: the models' names if None.
        verify: checkpoints must be as they were written; False for one that was changed on purpose.

    Raises:
        ConfigError: a file can't be read or written, or is nothing that a report can show.
        CheckpointError: a file is damaged; the message names it.
        MissingDependency: jinja2, or for a checkpoint safetensors, is not installed.
    """
    if markdown is not None and markdown.resolve() == output.resolve():
        raise ConfigError(f"the Markdown would replace the page {output}", hint="Give --markdown another file name.")
    for path in (output, *([markdown] if markdown else [])):
        require_output(path, *files)
    content = gather(read_sources(files, verify=verify), title)
    page = render(content)
    write_bytes(output, page.encode())
    if markdown is not None:
        write_bytes(markdown, write_markdown(content).encode())
    return Report(
        page=str(output),
        markdown=None if markdown is None else str(markdown),
        title=content.title,
        models=[each.title for each in content.answers],
        caveats=list(content.caveats),
        files=[file for file, _ in content.files],
    )
