"""The forms of an exported model that ONNX Runtime may run, and where; which are worth trying against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eamdeploy.engines.manifest import EngineForm, Manifest
from eamdeploy.engines.ort.providers import PROVIDERS, installed_providers
from eamdeploy.engines.registry import load_backend
from eamdeploy.errors import ConfigError, EngineError
from eamdeploy.vocabulary import Int8, ProviderName


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
            raise ConfigError(f"provider {self.provider} has no fused attention", hint="Leave fused attention out.")
        if self.int8 and self.int8 not in takes.int8:
            raise ConfigError(
                f"no engine in {self.int8} INT8 is built for provider {self.provider}",
                hint="Give images to calibrate with: static INT8 suits it."
                if "static" in takes.int8
                else "Leave INT8 out, or take another provider.",
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
    def record(self) -> EngineForm:
        """This form as a manifest holds it."""
        return EngineForm(
            fused_attention=self.fused_attention,
            int8=self.int8,
            provider=self.provider,
        )

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


def forms_for(
    providers: Sequence[ProviderName] | None, *, fused_attention: bool, int8: bool, calibrated: bool, tune: bool
) -> list[OrtForm]:
    """The forms that these options ask for: one, or with `tune` all `candidates`.

    Args:
        providers: None for the CPU, or with `tune` for all that are here; more than one only with `tune`.
        calibrated: there are images to calibrate with, so INT8 is static, or with `tune` perhaps so.

    Raises:
        ConfigError: the options don't go together, or a provider does not take them.
        MissingDependency: all providers are asked for, and ONNX Runtime is not installed here.
    """
    if tune and fused_attention:
        raise ConfigError("tuning tries fused attention too", hint="Leave one of the two out.")
    if tune:
        if providers is None:
            load_backend("ort")
            providers = installed_providers()
        forms = candidates(list(dict.fromkeys(providers)), int8=int8, calibrated=calibrated)
        if int8 and not any(form.int8 for form in forms):
            raise ConfigError(
                f"no form in INT8 can be tried on {', '.join(providers)}",
                hint="Leave INT8 out, give images to calibrate with, or take another provider.",
            )
        return forms
    if providers is not None and len(providers) > 1:
        raise ConfigError(
            "several providers can only be tried", expected="one, or tuning beside them", got=", ".join(providers)
        )
    kind: Int8 = "static" if calibrated else "dynamic"
    return [OrtForm(fused_attention, kind if int8 else None, providers[0] if providers else "cpu")]


def chosen_form(manifest: Manifest, forms: Sequence[OrtForm]) -> OrtForm:
    """Which of the `forms` that its build was given the engine has.

    Where no forms were tried against each other, it is the first.

    Raises:
        EngineError: the manifest does not say, or it is another form.
    """
    chosen = [tried for tried in manifest.tried or () if tried.chosen]
    if not chosen:
        return forms[0]
    found = [form for form in forms if form.record == chosen[0].made_of]
    if not found:
        raise EngineError(
            f"it is not known which form of the model the engine {manifest.engine} has",
            expected=f"one of {', '.join(form.name for form in forms)}",
            got="a manifest of an older version, which has the form in words only"
            if chosen[0].made_of is None
            else chosen[0].form,
            hint="Build the engine again with this version of eamdeploy.",
        )
    return found[0]
