"""The few calls of the CUDA runtime that running an engine needs, through NVIDIA's package cuda-python.

The package has its functions in `cuda.bindings.runtime`, before 12.6 in `cuda.cudart`. Each returns a tuple that begins
with an error code.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.errors import DeviceError, EngineError, MissingDependency

_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
_NON_BLOCKING = 1  # cudaStreamNonBlocking: not held up by the default stream


def import_cuda() -> Any:
    """The module with the CUDA runtime's functions.

    Raises:
        MissingDependency: cuda-python is not installed, or can't load CUDA.
    """
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as err:
            reasons.append(str(err))
    raise MissingDependency(
        f"running TensorRT engines needs the package cuda-python: {reasons[0]}",
        hint="Get it with: pip install 'cuda-python<13' for CUDA 12 (JetPack 6), pip install cuda-python for CUDA 13.",
    )


class Cuda:
    """CUDA's runtime with errors as exceptions; handles and addresses are plain numbers.

    Args:
        runtime: what `import_cuda` returns.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._runtime, name)(*arguments)
        if int(code) == 0:
            return results[0] if results else None
        message = f"{name} failed: {getattr(code, 'name', code)}"
        if "MemoryAllocation" in message:
            raise DeviceError(message, hint="The GPU's memory is full: stop other programs, or use a smaller batch.")
        raise EngineError(message)

    def device_buffer(self, size: int) -> int:
        """Address of new memory on the GPU, `size` bytes."""
        return int(self._call("cudaMalloc", size))

    def free_device_buffer(self, address: int) -> None:
        self._call("cudaFree", address)

    def host_buffer(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A new float32 array that is locked in memory, so that copies from and to it don't wait."""
        count = int(np.prod(shape))
        address = int(self._call("cudaMallocHost", count * np.dtype(np.float32).itemsize))
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)

    def free_host_buffer(self, array: NDArray[np.float32]) -> None:
        self._call("cudaFreeHost", array.ctypes.data)

    def copy_in(self, target: int, source: NDArray[np.float32], stream: Any) -> None:
        """Queues a copy of the array to the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)

    def copy_out(self, target: NDArray[np.float32], source: int, stream: Any) -> None:
        """Queues a copy from the GPU to the array."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)

    def stream(self) -> Any:
        """A new stream of its own; `int()` of it is the handle."""
        return self._call("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def wait(self, stream: Any) -> None:
        """Everything queued in the stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def event(self) -> Any:
        """A new event."""
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when what is queued now is done."""
        self._call("cudaEventRecord", event, stream)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two events that have happened."""
        return float(self._call("cudaEventElapsedTime", start, end))

    def destroy_event(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    def begin_capture(self, stream: Any) -> None:
        """What is queued from now on is recorded, not run."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        """What was recorded, as a graph that `launch` runs."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Queues everything in the graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)
