"""What ONNX Runtime says of a model that it refuses, in one line that has the fact, and what to do about it.

Its messages begin with a code, a path and the C++ signature of whoever found the fault; the number that matters comes
last. Source: its messages, as versions 1.18 to 1.32 write them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LONGEST = 400

_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_LOADING = re.compile(r"^(?:Load model from .*? failed: ?)+", re.DOTALL)
# a file of its sources, a line, and a function with its arguments, whose types may have parentheses themselves
_PLACE = re.compile(
    r"(?:^|(?<=[:\s]))/?[\w./\\:-]+\.(?:cc|cpp|cu|h|hpp|cuh):\d+ (?:[^()]*\((?:[^()]|\([^()]*\))*\)(?: const)?"
    r"(?: \[with [^\]]*\])? )?"
)
_TRACE = re.compile(r"\s*Stack ?trace:.*", re.DOTALL | re.IGNORECASE)

_UPDATE = "Update ONNX Runtime"


@dataclass(frozen=True)
class Reason:
    """Why a model was refused.

    Attributes:
        text: without a final full stop.
        hint: what to try; None for a fault that is not known here.
    """

    text: str
    hint: str | None = None


# Patterns, what they mean and what to try, both with the patterns' groups and {version} of ONNX Runtime.
_KNOWN: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), text, hint)
    for pattern, text, hint in (
        (
            r"[Uu]nsupported model IR version: (?P<got>\d+), max supported IR version: (?P<most>\d+)",
            "its IR version is {got}, and ONNX Runtime {version} reads up to {most}",
            f"{_UPDATE}, or write the model with IR version {{most}} or lower.",
        ),
        (
            r"Opset (?P<got>\d+) is under development.*support for domain (?P<domain>\S+) is till opset (?P<most>\d+)",
            "its operator set is {domain} {got}, and ONNX Runtime {version} reads up to {most}",
            f"{_UPDATE}, or export the model again with operator set {{most}} or lower.",
        ),
        (
            r"No Op registered for (?P<op>\S+) with domain_version of (?P<opset>\d+)",
            "it has the operator {op}, which ONNX Runtime {version} does not have in operator set {opset}",
            f"{_UPDATE}, or export the model without this operator.",
        ),
        (
            r"No opset import for domain '?(?P<domain>[^']*)'?",
            "it has an operator of the domain {domain!r}, whose version it does not name",
            "Add the domain to the model's opset_import, or export the model again.",
        ),
        (
            r"(?P<op>[\w.-]*:\w+)\([-\d]+\) is not a registered function/op",
            "it has the operator {op}, which ONNX Runtime {version} does not have",
            f"{_UPDATE}, or export the model without this operator: operators from a library of their own are not "
            "loaded.",
        ),
        (
            r"external (?:data|tensor|initializer)|[Ee]xternal_?[Dd]ata",
            "it keeps data in a second file, which is not there or can't be used: {said}",
            "Copy that file beside the model under its own name, or write the model in one file.",
        ),
        (
            r"[Pp]rotobuf parsing failed",
            "it is damaged or no ONNX model",
            "It was cut off or altered on its way, or another file has its name: copy or export it again.",
        ),
        (
            r"No graph was found in the protobuf",
            "there is no graph in it",
            "It is no ONNX model, or was cut off: copy or export it again.",
        ),
        (
            r"File doesn't exist",
            "there is no such file",
            "Check its name.",
        ),
        (
            r"Node input '(?P<name>.*?)' is not a graph input, initializer, or output of a previous node",
            "a node reads {name!r}, which nothing in it gives",
            "The model is damaged, or an initializer was left out: export it again.",
        ),
    )
)  # fmt: skip


def explain(message: str, version: str) -> Reason:
    """What the message of an exception of ONNX Runtime says.

    Args:
        version: of ONNX Runtime.
    """
    said = plain(message)
    for pattern, text, hint in _KNOWN:
        found = pattern.search(said)
        if found is not None:
            facts = {**found.groupdict(), "version": version, "said": said}
            return Reason(text.format(**facts), hint.format(**facts))
    return Reason(said)


def plain(message: str) -> str:
    """The message in one line, without error code, paths of sources, signatures and stack; long ones lose their middle.

    The fact stands at the end of such messages as often as at their beginning.
    """
    line = _LOADING.sub("", _CODE.sub("", _TRACE.sub("", message.strip())))
    line = " ".join(_PLACE.sub("", line).split()).rstrip(". ")
    if len(line) <= _LONGEST:
        return line or "it does not say why"
    part = (_LONGEST - 3) // 2
    return f"{line[:part]} … {line[-part:]}"
