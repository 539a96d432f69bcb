"""What `export` says that it wrote; readable without torch."""

from __future__ import annotations

from eamdeploy.artifacts.records import Record
from eamdeploy.parity.gate import ParityReport
from eamdeploy.records.gain import Gain


class ExportedModel(Record):
    """One ONNX model that `export` wrote.

    Attributes:
        digest, bytes: of its file, or of both where it has two (`onnx_files.digest_model`).
        nodes_stock, nodes: nodes as torch exported it (constants folded), and after the passes.
        parity: the graph on ONNX Runtime with its optimizer off, against the reference forward in torch.
        reference: the file beside it with the images and logits of that comparison.
    """

    file: str
    digest: str
    bytes: int
    nodes_stock: int
    nodes: int
    rewrites: list[str]
    exporter: str
    parity: ParityReport
    reference: str


class Export(Record):
    """What `export` wrote.

    Attributes:
        baseline: the unfrozen twin, if asked for.
        stock: the unfrozen model as torch exported it, if asked for.
        gain: the frozen model against its twin on this machine, if asked for.
    """

    frozen: ExportedModel
    baseline: ExportedModel | None
    gain: Gain | None = None
    stock: ExportedModel | None = None
