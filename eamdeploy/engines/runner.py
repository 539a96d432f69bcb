"""What every engine backend offers: an engine that is loaded and ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.records import Record
from eamdeploy.errors import ConfigError


@dataclass(frozen=True)
class EngineIO:
    """The engine's one input and one output.

    Attributes:
        input_shape: [B, 3, H, W] of the input; B is None when any batch size is accepted.
        num_classes: width of the logits; None when the engine does not say.
        takes_pixels: the input is uint8, normalized by the engine itself; otherwise float32, normalized already.
    """

    input_name: str
    input_shape: tuple[int | None, int, int, int]
    output_name: str
    num_classes: int | None
    takes_pixels: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the input."""
        return np.dtype(np.uint8 if self.takes_pixels else np.float32)

    @property
    def batch(self) -> int | None:
        """The only batch size accepted, or None for any."""
        return self.input_shape[0]

    def check(self, images: NDArray[Any], engine: str) -> None:
        """`images` can be given to the engine.

        Raises:
            ConfigError: another dtype or shape, or no image.
        """
        dims = zip(self.input_shape, images.shape, strict=False)
        fits = images.ndim == 4 and all(want in (None, got) for want, got in dims)
        if images.dtype != self.dtype or not fits or len(images) == 0:
            raise ConfigError(
                f"engine {engine} can't take this input",
                expected=f"{self.dtype} {['B' if dim is None else dim for dim in self.input_shape]}",
                got=f"{images.dtype} {list(images.shape)}",
            )


class LatencySplit(Record):
    """Where the time of one inference goes; medians over the runs.

    Attributes:
        copy_in_ms, compute_ms, copy_out_ms: on the GPU, between events.
        enqueue_ms: of the processor, to queue all that.
        cuda_graph: whether it was queued as one recorded graph; copies are then part of `compute_ms`.
    """

    runs: int
    batch: int
    copy_in_ms: float
    compute_ms: float
    copy_out_ms: float
    enqueue_ms: float
    cuda_graph: bool


class Runner(Protocol):
    """An engine loaded and ready to run; closes itself as a context manager.

    Attributes:
        name: the engine's path, for messages.
        card: the model's description; None for a foreign model.
        settings: the backend's own options that it runs with, by its own names.
    """

    @property
    def name(self) -> str: ...

    @property
    def io(self) -> EngineIO: ...

    @property
    def card(self) -> ModelCard | None: ...

    @property
    def settings(self) -> Mapping[str, str]: ...

    @property
    def device_memory_bytes(self) -> int | None:
        """What it needs on a GPU to run, besides its weights; None without a GPU."""
        ...

    def infer(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits float32 [B, classes] of images [B, 3, H, W] of the type that `io` says, when they are all computed.

        Raises:
            ConfigError: the input's dtype or shape does not fit.
            EngineError: the backend failed.
        """
        ...

    def split(self, images: NDArray[Any], runs: int) -> LatencySplit | None:
        """Where the time of an inference of these images goes; None where nothing is copied to a device.

        Raises:
            ConfigError: the images don't fit, or are more than the engine takes at once.
            EngineError: the backend failed.
        """
        ...

    def layer_times(self, images: NDArray[Any], runs: int) -> dict[str, float]:
        """Mean milliseconds of every layer on these images, in the engine's order; measuring slows it a little.

        Raises:
            ConfigError: the images don't fit.
            EngineError: the backend failed, or can't tell.
        """
        ...

    def close(self) -> None:
        """The engine's memory is released; a second call does nothing."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
