"""Which forms the options of a build ask for, and which of them an engine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from eamdeploy.convert import ort_form
from eamdeploy.convert.ort_form import AS_EXPORTED, OrtForm, candidates, chosen_form, forms_for
from eamdeploy.engines.manifest import Manifest, TriedForm, manifest_path
from eamdeploy.errors import ConfigError, EngineError
from eamdeploy.vocabulary import ProviderName


def forms(
    *providers: ProviderName,
    fused_attention: bool = False,
    int8: bool = False,
    calibrated: bool = False,
    tune: bool = False,
) -> list[OrtForm]:
    """`forms_for` with no provider named as None."""
    return forms_for(providers or None, fused_attention=fused_attention, int8=int8, calibrated=calibrated, tune=tune)


def test_options_without_tuning_are_one_form() -> None:
    assert forms() == [AS_EXPORTED]
    assert forms("xnnpack") == [OrtForm(provider="xnnpack")]
    assert forms(fused_attention=True, int8=True) == [OrtForm(True, "dynamic")]
    assert forms("openvino", int8=True, calibrated=True) == [OrtForm(int8="static", provider="openvino")]


def test_tuning_tries_all_that_is_here_or_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_form, "installed_providers", lambda: ["cpu", "openvino"])
    assert forms(tune=True) == candidates(["cpu", "openvino"], int8=False, calibrated=False)
    assert forms("cpu", "cpu", tune=True, int8=True) == candidates(["cpu"], int8=True, calibrated=False)
    assert forms("openvino", "cpu", tune=True)[0] == OrtForm(provider="openvino")


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="tuning tries fused attention too"):
        forms(tune=True, fused_attention=True)
    with pytest.raises(ConfigError, match=r"several providers can only be tried.*got cpu, openvino"):
        forms("cpu", "openvino")
    with pytest.raises(ConfigError, match=r"no form in INT8 can be tried on openvino, cuda.*calibrate"):
        forms("openvino", "cuda", tune=True, int8=True)
    with pytest.raises(ConfigError, match="provider openvino has no fused attention"):
        forms("openvino", fused_attention=True)


def test_an_engine_has_the_only_form_or_the_one_that_was_chosen(eam_engine: Path) -> None:
    manifest = Manifest.read(manifest_path(eam_engine))
    tried = candidates(["cpu"], int8=True, calibrated=False)
    assert chosen_form(manifest, tried[2:3]) == tried[2]
    for chosen in tried:
        told = [TriedForm(form="reworded", made_of=form.record) for form in tried]
        told[tried.index(chosen)] = told[0].model_copy(update={"made_of": chosen.record, "chosen": True})
        assert chosen_form(manifest.model_copy(update={"tried": told}), tried) == chosen


def test_a_form_that_stands_in_words_only_or_was_not_asked_for_is_refused(eam_engine: Path) -> None:
    manifest = Manifest.read(manifest_path(eam_engine))
    tried = candidates(["cpu"], int8=True, calibrated=False)
    older = TriedForm(form=tried[0].name, chosen=True)
    assert TriedForm.parse('{"form": "as exported", "chosen": true}', "an older manifest") == older
    said = r"one of as exported, .*a manifest of an older version.*Build the engine"
    with pytest.raises(EngineError, match=said):
        chosen_form(manifest.model_copy(update={"tried": [older]}), tried)
    other = OrtForm(provider="openvino")
    told = [TriedForm(form=other.name, made_of=other.record, chosen=True)]
    said = r"which form of the model the engine .*got as exported on openvino"
    with pytest.raises(EngineError, match=said):
        chosen_form(manifest.model_copy(update={"tried": told}), tried)
