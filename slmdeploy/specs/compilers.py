"""Compiler: how a profile of the engine tensorrt has its graph compiled; what for is the target's to say."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from slmdeploy.specs.base import Positive, Spec


class Compiler(Spec):
    """Settings of TensorRT's builder; docs/tensorrt.md has what each is for.

    ``module``: tensorrt compiles for the GPU at hand, tensorrt_rtx ahead of time for the target's compute capability.
    ``through``: its own bindings make a plan that is shipped, or ONNX Runtime's provider compiles the graph on opening.
    ``level`` 0 to 5 trades time to build for speed, None leaves it to the compiler. ``timing_cache`` is a file that
    keeps what kernels took, for later builds on the same GPU. ``timeout_s`` bounds the whole compilation.
    """

    module: Literal["tensorrt", "tensorrt_rtx"]
    through: Literal["bindings", "onnxruntime"] = "bindings"
    workspace_bytes: Positive = 1 << 32
    level: Annotated[int, Field(ge=0, le=5)] | None = None
    options: tuple[Literal["weight-streaming", "version-compatible", "hardware-compatible"], ...] = Field(
        default=(), strict=False
    )
    timing_cache: str | None = None
    timeout_s: Positive = 3600

    @model_validator(mode="after")
    def _options_work_without_a_gpu(self) -> Self:
        """What TensorRT for RTX needs a GPU for, or has nothing to time, when it compiles ahead of time."""
        if self.module == "tensorrt_rtx" and self.timing_cache:
            raise ValueError("module = 'tensorrt_rtx' compiles ahead of time and times nothing: leave timing_cache out")
        if self.module == "tensorrt_rtx" and self.options:
            raise ValueError(f"module = 'tensorrt_rtx' does not take {self.options[0]!r}: leave options out")
        return self

    @model_validator(mode="after")
    def _providers_take_less(self) -> Self:
        """What ONNX Runtime's providers have no option for, or keep in a place of their own."""
        if self.through == "bindings":
            return self
        has_level = self.module == "tensorrt_rtx" and self.level is not None
        strange = {"options": bool(self.options), "timing_cache": bool(self.timing_cache), "level": has_level}
        for name, given in strange.items():
            if given:
                raise ValueError(f"through = 'onnxruntime' with module = {self.module!r} does not take {name}")
        return self
