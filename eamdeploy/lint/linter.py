"""Check an ONNX model against what a version of TensorRT takes; TensorRT itself is not needed."""

from __future__ import annotations

from pathlib import Path

import onnx

from eamdeploy.artifacts.file_kinds import in_words
from eamdeploy.artifacts.onnx_files import read_model
from eamdeploy.artifacts.records import Record
from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.errors import CheckpointError
from eamdeploy.graph.texts import has_only_text
from eamdeploy.graph.weights import deserialize
from eamdeploy.lint import fusion, operators, quantization
from eamdeploy.lint.base import Finding, Rule
from eamdeploy.lint.view import view

RULES: tuple[Rule, ...] = (*operators.RULES, *quantization.RULES, *fusion.RULES)


class LintReport(Record):
    """What `lint` found in a file.

    Attributes:
        trt: the version of TensorRT, as it was given.
        findings: errors first.
    """

    file: str
    trt: str
    findings: list[Finding]

    @property
    def errors(self) -> int:
        """How many findings stop TensorRT."""
        return sum(finding.severity == "error" for finding in self.findings)


def lint(model: onnx.ModelProto, version: TrtVersion) -> list[Finding]:
    """Every place in `model` that breaks a rule for `version`, errors first, then in the order of `RULES`.

    Raises:
        ConfigError: TensorRT before 8.5.
    """
    graph, can = view(model), capabilities(version)
    findings = [
        Finding(
            rule=rule.id, severity=rule.severity, node=place.node, message=place.message, remedy=_for(version, rule)
        )
        for rule in RULES
        for place in rule.check(graph, can)
    ]
    return sorted(findings, key=lambda finding: finding.severity)


def lint_file(path: Path, version: TrtVersion) -> LintReport:
    """`lint` of the ONNX model at `path`.

    Raises:
        ConfigError: a file can't be read, or TensorRT before 8.5.
        CheckpointError: it is no ONNX model, or a file with its data is too short or not in its folder.
    """
    data = read_model(path)
    try:
        model = deserialize(data)
    except Exception as err:  # protobuf's own
        raise CheckpointError(
            f"{path} is not an ONNX model", got=in_words(path, "onnx", otherwise="a file that is damaged or foreign")
        ) from err
    if not has_only_text(model):
        raise CheckpointError(f"{path} is damaged: it has names or other texts that are no UTF-8")
    if not model.opset_import or not model.graph.node:
        raise CheckpointError(f"{path} is not an ONNX model", expected="a graph with nodes and an operator set")
    return LintReport(file=str(path), trt=str(version), findings=lint(model, version))


def _for(version: TrtVersion, rule: Rule) -> str:
    return rule.remedy.replace("VERSION", str(version))
