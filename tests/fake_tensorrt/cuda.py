"""The CUDA runtime of cuda-python, on the processor: addresses are real, what is queued happens at once."""

# ruff: noqa: N802, N815

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable
from typing import Any


class Code:
    """An error code as cuda-python gives it."""

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name

    def __int__(self) -> int:
        return self.number


DONE = Code(0, "cudaSuccess")


class Handle:
    """A stream, event or graph."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.happened: float | None = None
        self.work: list[Callable[[], object]] = []

    def __int__(self) -> int:
        return self.number


class _Names:
    def __init__(self, *names: str) -> None:
        for number, name in enumerate(names, 1):
            setattr(self, name, number)


class FakeCuda:
    """`cuda.bindings.runtime`.

    Attributes:
        memory: every live allocation by address; `failing` names a function that fails with the code given.
    """

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.alive: set[int] = set()
        self.failing: dict[str, Code] = {}
        self.calls: list[str] = []
        self.capturing: list[Callable[[], object]] | None = None
        self._numbers = itertools.count(1000)
        self.cudaMemcpyKind = _Names("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost")
        self.cudaStreamCaptureMode = _Names("cudaStreamCaptureModeThreadLocal")

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda"):
            super().__getattribute__("calls").append(name)
            code = super().__getattribute__("failing").get(name)
            if code is not None:
                return lambda *_: (code,)
        return super().__getattribute__(name)

    def queue(self, work: Callable[[], object]) -> None:
        """Runs it, or keeps it for the graph that is being captured."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def _new(self) -> Handle:
        handle = Handle(next(self._numbers))
        self.alive.add(handle.number)
        return handle

    def _gone(self, handle: Handle) -> tuple[Code]:
        self.alive.remove(handle.number)
        return (DONE,)

    def cudaMalloc(self, size: int) -> tuple[Code, int]:
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return DONE, address

    def cudaFree(self, address: int) -> tuple[Code]:
        del self.memory[address]
        return (DONE,)

    cudaMallocHost, cudaFreeHost = cudaMalloc, cudaFree

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: Handle) -> tuple[Code]:
        del kind, stream
        self.queue(lambda: ctypes.memmove(target, source, size))
        return (DONE,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Code, Handle]:
        assert flags == 1
        return DONE, self._new()

    def cudaStreamSynchronize(self, stream: Handle) -> tuple[Code]:
        assert self.capturing is None and stream.number in self.alive
        return (DONE,)

    def cudaStreamDestroy(self, stream: Handle) -> tuple[Code]:
        return self._gone(stream)

    def cudaEventCreate(self) -> tuple[Code, Handle]:
        return DONE, self._new()

    def cudaEventRecord(self, event: Handle, stream: Handle) -> tuple[Code]:
        del stream
        event.happened = time.perf_counter()
        return (DONE,)

    def cudaEventElapsedTime(self, start: Handle, end: Handle) -> tuple[Code, float]:
        assert start.happened is not None and end.happened is not None
        return DONE, 1e3 * (end.happened - start.happened)

    def cudaEventDestroy(self, event: Handle) -> tuple[Code]:
        return self._gone(event)

    def cudaStreamBeginCapture(self, stream: Handle, mode: int) -> tuple[Code]:
        del stream, mode
        self.capturing = []
        return (DONE,)

    def cudaStreamEndCapture(self, stream: Handle) -> tuple[Code, Handle]:
        del stream
        graph = self._new()
        graph.work, self.capturing = self.capturing or [], None
        return DONE, graph

    def cudaGraphInstantiateWithFlags(self, graph: Handle, flags: int) -> tuple[Code, Handle]:
        assert flags == 0
        ready = self._new()
        ready.work = graph.work
        return DONE, ready

    def cudaGraphDestroy(self, graph: Handle) -> tuple[Code]:
        return self._gone(graph)

    def cudaGraphExecDestroy(self, graph: Handle) -> tuple[Code]:
        return self._gone(graph)

    def cudaGraphLaunch(self, graph: Handle, stream: Handle) -> tuple[Code]:
        del stream
        for work in graph.work:
            work()
        return (DONE,)
