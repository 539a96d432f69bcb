"""Make a timm model in evaluation mode, float32 on the CPU, with the weights that the user names."""

from __future__ import annotations

import difflib
import json
import math
import pickle
import pickletools
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import timm
import torch
from pydantic import ValidationError
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import nn

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.file_kinds import FileKind, recognize
from eamdeploy.artifacts.files import is_file, is_folder
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.images.options import PreprocessingOverrides

PRETRAINED = "pretrained"
RANDOM = "random"

_STATE_DICT = "tensors by name, at the top or under model, state_dict or model_ema"
_OWN_EXPORT = "eamdeploy makes this of PyTorch weights itself: give the weights that it was made of."
_OTHER_LIBRARY = "Its tensors have other names than timm's: take the weights that timm or PyTorch has of the model."
# What to do about files of other kinds that are given as weights, by the kind's key.
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "torchscript": "In Python: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth'); give that.",
        "torch.export": "In Python: torch.save(torch.export.load(FILE).state_dict, 'weights.pth'); give that.",
        "npz": "timm converts JAX weights of ViT: model = timm.create_model(NAME); model.load_pretrained(FILE); "
        "torch.save(model.state_dict(), 'weights.pth'); give that.",
        "safetensors": "Give the file a name that ends in .safetensors.",
        "torch": "Give the file a name that ends in .pth.",
        "pickle": "Give the file a name that ends in .pth.",
        "json": "Give the file with the tensors; an index of several files names them, but has none.",
        "ort": _OWN_EXPORT,
        "onnx": _OWN_EXPORT,
        "plan": _OWN_EXPORT,
        **dict.fromkeys(("hdf5", "keras", "tflite", "gguf", "msgpack", "core-ml"), _OTHER_LIBRARY),
    }
)
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # torch.serialization.MAGIC_NUMBER
_LEGACY_PICKLES = 5  # this number, a version, the system, the object and the names of its storages
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
    if not is_file(path):
        raise ConfigError(
            f"no weights file at {path}",
            got="a folder" if is_folder(path) else None,
            hint="Use --weights pretrained, --weights random or an existing file.",
        )
    _require_weights_format(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the pickles that it then refuses
            state = load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except Exception as err:  # safetensors, zipfile and torch each raise their own kinds
        raise _unreadable(path, err) from err
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else ""
        raise CheckpointError(
            f"{path} holds no state dict", expected=_STATE_DICT, got=f"keys {keys}" if keys else "none there"
        )
    return state


def _require_weights_format(path: Path) -> None:
    """The file is a safetensors or PyTorch file, and has the ending of one, or of no known kind.

    Raises:
        CheckpointError: it is something else; says what, and what to do about it.
    """
    kind, is_named_safetensors = recognize(path), path.suffix == ".safetensors"
    if kind is None or (kind.key in ("torch", "pickle") and not is_named_safetensors):
        return
    if kind.key == "safetensors" and is_named_safetensors:
        return
    raise CheckpointError(
        f"cannot read weights from {path}",
        expected="a safetensors file" if is_named_safetensors else "a PyTorch file (.pth) or a .safetensors file",
        got=kind.words,
        hint=_INSTEAD.get(kind.key) or kind.remedy or "Give weights in PyTorch's format: .safetensors or .pth.",
    )


def _unreadable(path: Path, err: Exception) -> CheckpointError:
    """What to say of a file that has the form of weights, without torch's advice to run what is in it."""
    refusal = err.__cause__ or err  # timm wraps torch's
    if isinstance(refusal, AttributeError):  # timm's, of an object that is no dictionary
        return CheckpointError(f"{path} holds no state dict", expected=_STATE_DICT, got="something else than a dict")
    kind = recognize(path)
    if isinstance(refusal, pickle.UnpicklingError) and kind is not None and _is_whole_pickle(path, kind):
        stranger = re.search(r"GLOBAL (\S+)", str(refusal))
        return CheckpointError(
            f"{path} wants unpickling, which can run code, and is not loaded",
            expected="tensors, numbers and texts only",
            got=stranger and stranger[1],
            hint="Where you trust it, load it in Python and save its state dict alone, best as safetensors.",
        )
    if kind is not None and kind.key == "pickle" and not _is_legacy(path) and _is_whole_pickle(path, kind):
        return CheckpointError(
            f"cannot read weights from {path}",
            expected="a PyTorch file (.pth) or a .safetensors file",
            got="a pickle that PyTorch did not write",
            hint="Save a state dict with torch.save, or best as safetensors.",
        )
    if kind is None:
        return CheckpointError(
            f"cannot read weights from {path}: it is damaged or neither a safetensors nor a PyTorch file",
            hint="It was cut off or altered on its way, or is in another format: copy or download it again.",
        )
    return CheckpointError(
        f"cannot read weights from {path}: it begins as {kind.words}, and is damaged",
        hint="It was cut off or altered on its way: copy or download it again.",
    )


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


def _is_whole_pickle(path: Path, kind: FileKind) -> bool:
    """Whether the file of that kind is no damaged one: its pickle, which is not run, has an end."""
    if kind.key != "pickle":
        return True  # the archive has its own check
    try:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES if _is_legacy(path) else 1):
                for _ in pickletools.genops(file):
                    pass
    except Exception:  # noqa: BLE001 - whatever pickletools finds wrong
        return False
    return True


def _is_legacy(path: Path) -> bool:
    """Whether PyTorch before 1.6 wrote the file, or a later one in that form."""
    with path.open("rb") as file:
        return file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC


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
