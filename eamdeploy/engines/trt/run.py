"""Runs TensorRT engines: one stream, buffers allocated once, CUDA events to tell where the time goes.

An inference is: images into locked host memory, copy to the GPU, compute, copy back, wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.engines.manifest import Manifest
from eamdeploy.engines.runner import LatencySplit
from eamdeploy.engines.trt.cuda import Cuda
from eamdeploy.engines.trt.engine import LoadedEngine
from eamdeploy.errors import ConfigError, EngineError


class TrtRunner:
    """An engine loaded into TensorRT, on the first GPU.

    A batch that is larger than the engine takes at once runs in parts; one that is smaller is filled up.

    Args:
        loaded: the engine; closed with the runner.
        runtime: the CUDA runtime's functions, see `import_cuda`.
        manifest: how it was built; None for a foreign engine. With its setting `cuda_graph` an inference is queued as
            one recorded graph: less work for the processor.

    Attributes:
        opt_batch: batch size that the engine's kernels were chosen for.
        device_memory_bytes: what it needs on the GPU to run, besides its weights.

    Raises:
        EngineError: it is no image classifier, or there is too little memory to run it.
        DeviceError: the GPU's memory is full.
    """

    def __init__(self, loaded: LoadedEngine, runtime: Any, manifest: Manifest | None) -> None:
        self.name = loaded.name
        self.io = loaded.io()
        self.card: ModelCard | None = manifest.card if manifest else None
        self.settings: Mapping[str, str] = MappingProxyType(manifest.settings if manifest else {})
        self.device_memory_bytes: int | None = loaded.device_memory_bytes()
        self._low, self.opt_batch, self._high = loaded.batch_range(self.io)
        if self.io.num_classes is None:
            raise EngineError(f"{self.name} does not say how many classes it has")
        self._use_graph = self.settings.get("cuda_graph") == "True"
        self._graphs: dict[int, Any] = {}
        self._cuda = Cuda(runtime)
        self._loaded: LoadedEngine | None = loaded
        with ExitStack() as held:
            held.callback(loaded.close)
            self._context: Any = loaded.context()
            held.callback(setattr, self, "_context", None)
            self._stream = self._cuda.stream()
            held.callback(self._cuda.destroy_stream, self._stream)
            self._images = self._host_buffer(held, (self._high, *self.io.input_shape[1:]))
            self._logits = self._host_buffer(held, (self._high, self.io.num_classes))
            self._input = self._device_buffer(held, self._images.nbytes)
            self._output = self._device_buffer(held, self._logits.nbytes)
            self._bind(self._context)
            self._held = held.pop_all()  # from here on `close` releases it all, before this a failure does

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 [B, classes] of normalized images float32 [B, 3, H, W].

        Raises:
            ConfigError: the input's dtype or shape does not fit.
            EngineError: the engine is closed or failed.
        """
        self.io.check(images, self.name)
        self._require_open()
        parts = []
        for start in range(0, len(images), self._high):
            part = images[start : start + self._high]
            batch = self._fill(part)
            self._queue(batch)
            self._cuda.wait(self._stream)
            parts.append(self._logits[: len(part)].copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def split(self, images: NDArray[np.float32], runs: int, warmup: int = 10) -> LatencySplit:
        """Where the time of an inference of these images goes.

        Raises:
            ConfigError: there are more images than the engine takes at once.
        """
        self.io.check(images, self.name)
        self._require_open()
        if len(images) > self._high or runs < 1:
            raise ConfigError("the split can't be measured", expected=f"at most {self._high} images", got=len(images))
        batch = self._fill(images)
        events = [self._cuda.event() for _ in range(4)]
        rows = []
        try:
            for run in range(warmup + runs):
                begin = time.perf_counter()
                if self._use_graph:
                    self._record(events[:2])  # copies are part of the graph, so they count as computing
                    self._queue(batch)
                    self._record(events[2:])
                else:
                    self._queue_parts(batch, events)
                enqueue_ms = 1e3 * (time.perf_counter() - begin)
                self._cuda.wait(self._stream)
                if run >= warmup:
                    rows.append([*(self._cuda.milliseconds(*pair) for pair in pairwise(events)), enqueue_ms])
        finally:
            for event in events:
                self._cuda.destroy_event(event)
        copy_in, compute, copy_out, enqueue = (float(value) for value in np.median(np.array(rows), axis=0))
        return LatencySplit(
            runs=runs,
            batch=batch,
            copy_in_ms=copy_in,
            compute_ms=compute,
            copy_out_ms=copy_out,
            enqueue_ms=enqueue,
            cuda_graph=self._use_graph,
        )

    def layer_times(self, images: NDArray[np.float32], runs: int = 20, warmup: int = 5) -> dict[str, float]:
        """Mean milliseconds of every layer, in the engine's order; in a context of its own, as measuring slows it."""
        self.io.check(images, self.name)
        loaded = self._require_open()
        batch = self._fill(images[: self._high])
        sums: dict[str, float] = {}
        base = loaded.trt.IProfiler

        class Profiler(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                sums[layer_name] = sums.get(layer_name, 0.0) + ms

        context = loaded.context()
        profiler = Profiler()
        context.profiler = profiler
        self._bind(context)
        self._cuda.copy_in(self._input, self._images[:batch], self._stream)
        for run in range(warmup + runs):
            if run == warmup:
                sums.clear()
            self._compute(context, batch)
            self._cuda.wait(self._stream)
        return {name: total / runs for name, total in sums.items()}

    def close(self) -> None:
        """The engine's memory is released; a second call does nothing."""
        if self._loaded is None:
            return
        self._loaded = None
        self._cuda.wait(self._stream)
        self._held.close()

    def __enter__(self) -> TrtRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> LoadedEngine:
        if self._loaded is None:
            raise EngineError(f"engine {self.name} is closed")
        return self._loaded

    def _host_buffer(self, held: ExitStack, shape: tuple[int, ...]) -> NDArray[np.float32]:
        buffer = self._cuda.host_buffer(shape)
        held.callback(self._cuda.free_host_buffer, buffer)
        return buffer

    def _device_buffer(self, held: ExitStack, size: int) -> int:
        address = self._cuda.device_buffer(size)
        held.callback(self._cuda.free_device_buffer, address)
        return address

    def _bind(self, context: Any) -> None:
        context.set_tensor_address(self.io.input_name, self._input)
        context.set_tensor_address(self.io.output_name, self._output)

    def _fill(self, images: NDArray[np.float32]) -> int:
        """The locked host memory holds the images, the last again up to the smallest batch; its size is returned."""
        batch = max(len(images), self._low)
        self._images[: len(images)] = images
        self._images[len(images) : batch] = images[-1]
        return batch

    def _record(self, events: list[Any]) -> None:
        for event in events:
            self._cuda.record(event, self._stream)

    def _queue(self, batch: int) -> None:
        """One inference is queued, with its copies."""
        if not self._use_graph:
            self._queue_parts(batch, None)
            return
        if batch not in self._graphs:
            self._queue_parts(batch, None)  # outside of the graph first: TensorRT may set itself up
            self._cuda.wait(self._stream)
            self._cuda.begin_capture(self._stream)
            self._queue_parts(batch, None)
            self._graphs[batch] = self._cuda.end_capture(self._stream)
            self._held.callback(self._cuda.destroy_graph, self._graphs[batch])
        self._cuda.launch(self._graphs[batch], self._stream)

    def _queue_parts(self, batch: int, events: list[Any] | None) -> None:
        """Copy in, compute, copy out are queued, with four events around them."""
        steps: tuple[Callable[[], None], ...] = (
            lambda: self._cuda.copy_in(self._input, self._images[:batch], self._stream),
            lambda: self._compute(self._context, batch),
            lambda: self._cuda.copy_out(self._logits[:batch], self._output, self._stream),
        )
        for index, step in enumerate(steps):
            if events is not None:
                self._cuda.record(events[index], self._stream)
            step()
        if events is not None:
            self._cuda.record(events[-1], self._stream)

    def _compute(self, context: Any, batch: int) -> None:
        shape = (batch, *self.io.input_shape[1:])
        if not context.set_input_shape(self.io.input_name, shape) or not context.execute_async_v3(int(self._stream)):
            loaded = self._require_open()
            raise EngineError(f"TensorRT failed to run {self.name} on {list(shape)}: {loaded.log.last_errors()}")
