"""The forms of an exported model that ONNX Runtime may run, and where; which are worth trying against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eamdeploy.engines.base import ProviderName
from eamdeploy.engines.ort_providers import PROVIDERS
from eamdeploy.errors import ConfigError

Int8 = Literal["dynamic", "static"]


@dataclass(frozen=True)
class OrtForm:
    """How a model is specialised to ONNX Runtime; with the defaults it stays the exported file, byte for byte.

    Attributes:
        fused_attention: live attention is an operator of ONNX Runtime's own, see `passes.fused_attention`.
        int8: linear layers are INT8, with activations quantized as they come (see `ort_int8`), or by ranges from
            calibration (see `passes.quantize_products`), and then products of attention that are not fused too.
        provider: the execution provider that runs it.

    Raises:
        ConfigError: the provider does not take that.
    """

    fused_attention: bool = False
    int8: Int8 | None = None
    provider: ProviderName = "cpu"

    def __post_init__(self) -> None:
        takes = PROVIDERS[self.provider]
        if self.fused_attention and not takes.fused_attention:
            raise ConfigError(f"provider {self.provider} has no fused attention", hint="Leave --fused-attention out.")
        if self.int8 and self.int8 not in takes.int8:
            raise ConfigError(
                f"no engine in {self.int8} INT8 is built for provider {self.provider}",
                hint="Give --calib-data too: static INT8 suits it."
                if "static" in takes.int8
                else "Leave --int8 or --provider out.",
            )

    @property
    def is_exported(self) -> bool:
        """Whether the model stays as it is."""
        return not self.fused_attention and self.int8 is None

    @property
    def name(self) -> str:
        parts = [*(["fused attention"] if self.fused_attention else []), *([f"{self.int8} INT8"] if self.int8 else [])]
        place = "" if self.provider == "cpu" else f" on {self.provider}"
        return (", ".join(parts) or "as exported") + place

    @property
    def settings(self) -> Mapping[str, str]:
        """Of its sessions, by ONNX Runtime's names."""
        # a session that folds Q/DQ into constants would leave nothing in INT8
        keep = {"session.disable_quant_qdq": "0"} if self.int8 == "static" else {}
        return {**PROVIDERS[self.provider].settings, **keep}


AS_EXPORTED = OrtForm()


def candidates(providers: Sequence[ProviderName], *, int8: bool, calibrated: bool) -> list[OrtForm]:
    """The forms that can be fastest somewhere, the plainest first.

    Args:
        providers: those that may run it.
        int8: INT8 is worth trying too.
        calibrated: there are images to calibrate with.
    """
    kinds: list[Int8 | None] = [None, *(("dynamic",) if int8 else ()), *(("static",) if int8 and calibrated else ())]
    return [
        OrtForm(fused, kind, provider)
        for provider in providers
        for kind in kinds
        for fused in (False, True)
        if (kind is None or kind in PROVIDERS[provider].int8) and (not fused or PROVIDERS[provider].fused_attention)
    ]
