"""A serialized engine in memory, and what it says about itself.

TensorRT's objects must be released in order: contexts before engines before the runtime, the logger last.
"""

from __future__ import annotations

from typing import Any

from eamdeploy.artifacts.file_kinds import in_words
from eamdeploy.engines.runner import EngineIO
from eamdeploy.engines.trt.log import BuildLog, make_logger
from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.errors import EngineError


class LoadedEngine:
    """An engine in memory, with the runtime and the logger that it needs as long as it lives.

    Args:
        trt: the module tensorrt; there must be a GPU.
        data: the serialized engine.
        host_code: the engine may run code of its own on the processor, which version-compatible ones contain.
        name: for messages.

    Raises:
        EngineError: TensorRT refuses it; with its reasons, which name versions where they differ.
    """

    def __init__(self, trt: Any, data: bytes, *, host_code: bool, name: str) -> None:
        self.trt, self.name = trt, name
        self.log = BuildLog()
        self._logger = make_logger(trt, self.log)
        self._runtime = trt.Runtime(self._logger)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        try:
            self.engine = self._runtime.deserialize_cuda_engine(data)
        except (RuntimeError, TypeError) as err:
            raise _unusable(name, data, str(err)) from err
        if self.engine is None:
            raise _unusable(name, data, self.log.last_errors())

    def io(self) -> EngineIO:
        """The engine's one input and one output.

        Raises:
            EngineError: it has others, so it is no image classifier.
        """
        engine, trt = self.engine, self.trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineError(
                f"{self.name} is no image classifier",
                expected="one input and one output",
                got=f"{len(inputs)} inputs and {len(outputs)} outputs",
            )
        shape, result = (tuple(engine.get_tensor_shape(name)) for name in (inputs[0], outputs[0]))
        types = [engine.get_tensor_dtype(name) for name in (inputs[0], outputs[0])]
        if (
            any(each != trt.DataType.FLOAT for each in types)
            or len(shape) != 4
            or min(shape[1:]) < 1
            or len(result) != 2
        ):
            raise EngineError(
                f"{self.name} has an input or output that can't be used",
                expected="float32 [B, 3, height, width] and [B, classes], only B may vary",
                got=f"{types[0]} {list(shape)} and {types[1]} {list(result)}",
            )
        return EngineIO(
            input_name=inputs[0],
            input_shape=(None if shape[0] < 0 else shape[0], *shape[1:]),
            output_name=outputs[0],
            num_classes=result[1] if result[1] > 0 else None,
        )

    def batch_range(self, io: EngineIO) -> tuple[int, int, int]:
        """The smallest, the best and the largest batch that the engine takes at once."""
        low, best, high = (shape[0] for shape in self.engine.get_tensor_profile_shape(io.input_name, 0))
        return low, best, high

    def device_memory_bytes(self) -> int:
        """What running it needs on the GPU, besides its weights."""
        can = capabilities(TrtVersion.parse(self.trt.__version__))
        return int(getattr(self.engine, can.device_memory))

    def context(self) -> Any:
        """A new execution context.

        Raises:
            EngineError: there is not enough memory for it.
        """
        context = self.engine.create_execution_context()
        if context is None:
            raise EngineError(f"TensorRT can't run {self.name}: {self.log.last_errors()}")
        return context

    def close(self) -> None:
        """Engine and runtime are released, in this order; a second call does nothing."""
        self.engine = None
        self._runtime = None


def _unusable(name: str, data: bytes, why: str) -> EngineError:
    return EngineError(
        f"TensorRT can't load {name}: {' '.join(why.split())}",
        got=in_words(data, "plan"),
        hint="It is damaged, no engine, or of another TensorRT or GPU: build it again here with `eamdeploy build-trt`.",
    )
