"""Make a timm model in evaluation mode, float32 on the CPU, with the weights that the user names."""

from __future__ import annotations

import difflib
import json
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pydantic import ValidationError
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import nn

from eamdeploy.artifact import Preprocessing
from eamdeploy.errors import CheckpointError, ConfigError

PRETRAINED = "pretrained"
RANDOM = "random"

_DERIVED = ("relative_position_index", "attn_mask")  # of Swin's windows; timm before 0.9 saved them with the weights


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and where its weights come from.

    Attributes:
        name: a timm architecture, optionally with a pretrained tag (`deit_tiny_patch16_224.fb_in1k`).
        weights: `pretrained` (timm's own, downloaded), `random` (seeded), or a path to .safetensors or .pth.
        kwargs: passed to `timm.create_model`, e.g. `{"img_size": 112, "num_classes": 10}`.
        seed: for `random`.
    """

    name: str
    weights: str = PRETRAINED
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def source(self) -> str:
        """Where the weights come from, without the user's folders: `pretrained`, `random` or a file name."""
        return self.weights if self.weights in (PRETRAINED, RANDOM) else Path(self.weights).name

    @property
    def plain_kwargs(self) -> dict[str, Any]:
        """`kwargs` as JSON holds them: tuples are lists. The model is made of these, here and when it is loaded again.

        Raises:
            ConfigError: one has no form in JSON.
        """
        try:
            plain: dict[str, Any] = json.loads(json.dumps(dict(self.kwargs), allow_nan=False))
        except (TypeError, ValueError) as err:
            raise ConfigError(
                "--model-kwargs", expected="numbers, texts, lists, true, false or None", got=dict(self.kwargs)
            ) from err
        return plain


@dataclass(frozen=True)
class PreprocessingOverrides:
    """What the user says about preprocessing; None leaves timm's data config in charge."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None


TIMM_PREPROCESSING = PreprocessingOverrides()


def load_model(spec: ModelSpec) -> Any:
    """The model of `spec`, in evaluation mode, with finite float32 weights.

    Raises:
        ConfigError: timm does not know the model or the arguments, or its weights can't be downloaded.
        CheckpointError: the weights file is damaged, foreign, wants unpickling or does not fit.
    """
    torch.manual_seed(spec.seed)
    model = _create(spec, pretrained=spec.weights == PRETRAINED)
    if spec.weights not in (PRETRAINED, RANDOM):
        load_weights(model, read_weights(Path(spec.weights)), spec.weights)
    _check_finite(model, spec.weights)
    return model.float().eval()  # Any: the attributes are timm's, not torch's


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors or .pth file; of a training checkpoint, its EMA weights if it has them.

    Nothing is unpickled: .pth files are read with `weights_only=True`.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: it is damaged, wants unpickling, or holds no state dict.
    """
    if not path.is_file():
        raise ConfigError(
            f"no weights file at {path}", hint="Use --weights pretrained, --weights random or an existing file."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the pickles that it then refuses
            state = load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except Exception as err:  # safetensors, zipfile and torch each raise their own kinds
        refusal = err.__cause__ or err  # timm wraps torch's
        if isinstance(refusal, pickle.UnpicklingError) and _is_pickle(path):
            stranger = re.search(r"GLOBAL (\S+)", str(refusal))
            raise CheckpointError(
                f"{path} wants unpickling, which can run code, and is not loaded",
                expected="tensors, numbers and texts only",
                got=stranger and stranger[1],
                hint="Save its state dict alone, best as safetensors.",
            ) from err
        foreign = isinstance(refusal, pickle.UnpicklingError)
        raise CheckpointError(
            f"cannot read weights from {path}: {'no PyTorch file' if foreign else _first_line(err)}",
            hint="The file is truncated or in another format; .safetensors and .pth are supported.",
        ) from err
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} holds no state dict",
            expected="tensors by name, at the top or under model, state_dict or model_ema",
            got=f"keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__,
        )
    return state


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """`model` has the weights of `state`, every one of them.

    Raises:
        CheckpointError: a name is missing or left over, or a shape differs; the first of each kind is named.
    """
    if any(key.startswith("eam.") for key in state):
        raise CheckpointError(
            f"{source} is an EAM checkpoint, not plain weights", hint="Give it to export or evaluate."
        )
    wanted = model.state_dict()
    state = {key: value for key, value in state.items() if key in wanted or key.rpartition(".")[2] not in _DERIVED}
    wrong = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if wrong:
        key = wrong[0]
        hint = "The weights are for another architecture or image size; see --model and --model-kwargs."
        if key.startswith("head"):
            hint = f"Try --model-kwargs num_classes={state[key].shape[0]}."
        raise CheckpointError(
            f"{source} does not fit the model: {key}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            expected=f"shape {list(wanted[key].shape)}",
            got=list(state[key].shape),
            hint=hint,
        )
    missing, extra = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or extra:
        raise CheckpointError(
            f"{source} does not fit the model",
            expected=f"its {len(wanted)} tensors",
            got=_differences(sorted(missing), sorted(extra)),
            hint="The weights are for another architecture; see --model and --model-kwargs.",
        )
    model.load_state_dict(state, strict=True)


def preprocessing_of(model: Any, overrides: PreprocessingOverrides) -> Preprocessing:
    """Timm's data config of `model` at the model's own image size, with the user's overrides.

    Raises:
        ConfigError: the config asks for something that is not supported.
    """
    config = resolve_data_config({}, model=model)
    height, width = model.patch_embed.img_size
    told = {key: value for key, value in asdict(overrides).items() if value is not None}
    known = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    try:
        return Preprocessing.model_validate({"size": (height, width), **known, **told})
    except ValidationError as err:
        first = err.errors()[0]
        raise ConfigError(
            f"preprocessing is not supported: {first['loc'][0]}: {first['msg']}", got=first["input"]
        ) from err


def to_numpy(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """The model's state dict as contiguous numpy arrays."""
    # not np.ascontiguousarray, which makes an array of one axis of a number, such as a batch norm's counter
    return {key: np.asarray(value.detach().numpy(), order="C") for key, value in model.state_dict().items()}


def _create(spec: ModelSpec, *, pretrained: bool) -> nn.Module:
    if not timm.is_model(spec.name):
        similar = difflib.get_close_matches(spec.name, timm.list_models(), n=5)
        raise ConfigError(
            f"timm {timm.__version__} has no model {spec.name!r}",
            hint=f"Similar: {', '.join(similar)}." if similar else "See timm.list_models().",
        )
    kwargs = spec.plain_kwargs
    try:
        model: nn.Module = timm.create_model(spec.name, pretrained=pretrained, **kwargs)
    except Exception as err:  # timm, torch and the hub's client raise many kinds
        if pretrained:
            raise ConfigError(
                f"cannot get the pretrained weights of {spec.name}: {_first_line(err)}",
                hint="Without a network use --weights FILE, or --weights random to measure latency only.",
            ) from err
        raise ConfigError(f"timm cannot make {spec.name} with {kwargs}: {_first_line(err)}") from err
    return model


def _is_pickle(path: Path) -> bool:
    """Whether the file starts like torch's zip archive or like a pickle; a text saved in its place does not."""
    with path.open("rb") as file:
        return file.read(1) in (b"P", b"\x80")


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0].rstrip(".") if str(err) else type(err).__name__


def _check_finite(model: nn.Module, source: str) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not math.isfinite(float(value.double().sum())):
            raise CheckpointError(
                f"{source}: {key} has NaN or infinite values", hint="The training run or the file is broken."
            )


def _differences(missing: list[str], extra: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing, first {missing[0]}")
    if extra:
        parts.append(f"{len(extra)} unknown, first {extra[0]}")
    return "; ".join(parts)
