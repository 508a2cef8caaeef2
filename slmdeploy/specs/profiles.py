"""Profile: how to build, and what that needs of a target; no fact about any hardware."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from slmdeploy.specs.base import Real, Share, Spec, load_named, shipped
from slmdeploy.specs.compilers import Compiler

ActivationScale = Literal["max", "percentile", "mse"]
RoundingMethod = Literal["nearest", "gptq", "quantease"]


class Weights(Spec):
    """How the linear layers inside the blocks are stored and multiplied."""

    scheme: Literal["fp32", "w8a8", "w8a8-static", "weight-only", "fp8"]
    bits: Literal[4, 8, 32] = 32
    block_size: Literal[16, 32, 64, 128, 256] = 128
    symmetric: bool = True

    @model_validator(mode="after")
    def _bits_fit_the_scheme(self) -> Self:
        allowed = {"fp32": (32,), "w8a8": (8,), "w8a8-static": (8,), "weight-only": (4, 8), "fp8": (8,)}[self.scheme]
        if self.bits not in allowed:
            raise ValueError(f"bits = {self.bits} does not go with scheme = {self.scheme!r}: use {allowed}")
        return self


class Storage(Spec):
    """Bits of a table that is treated apart: the embedding or the head."""

    bits: Literal[4, 8, 32] = 32
    block_size: Literal[16, 32, 64, 128, 256] = 128
    symmetric: bool = True


class Fp8(Spec):
    """Where the scales of the scheme fp8 come from: building/fp8.py defines the rules.

    ``per_channel``: a weight has one scale for each output channel, instead of one in all. Activations have one.
    ``smooth``: what is large in a few channels moves into the weights first (building/smooth.py). ``rotate``: the
    residual stream is turned before that (building/rotation.py), which graphs with norms as one operator take (opset 23
    and 24). ``attention``: both products of attention are FP8 too, which only graphs with attention written out have
    (opset 21).
    """

    activation_scale: ActivationScale = "max"
    weight_scale: Literal["amax", "mse"] = "amax"
    per_channel: bool = True
    smooth: bool = False
    rotate: bool = False
    attention: bool = False


class Requires(Spec):
    """What a profile needs of a target: all of ``isa`` to run at all, any of ``slow_without`` to be worth choosing."""

    isa: tuple[str, ...] = Field(default=(), strict=False)
    slow_without: tuple[str, ...] = Field(default=(), strict=False)


class SessionOptions(Spec):
    """Options of the engine's session; ``threads`` = 0 means all physical cores that the process may use."""

    threads: Annotated[int, Field(ge=0)] = 0
    spinning: bool = True


class Gate(Spec):
    """Quality limits against the build's own fp32 graph.

    Decoders: KL in nats per token, top-1 share, perplexity ratio. Encoders: the least cosine of a text's vectors, or
    the largest difference of a logit (relative where logits are above 1) and ``min_top1`` as the share of equal labels.
    """

    max_kl: Real = 0.02
    min_top1: Share = 0.9
    max_ppl_ratio: Real = 1.02
    min_cosine: Share = 0.98
    max_logit_difference: Real = 0.1


class Profile(Spec):
    """How to build: engine, precision, quantisation scheme, session options, and what it requires of a target.

    ``prefill`` and ``scoring`` are the forms of the linear layers in graphs of their own, for prompts and for scores,
    where those are others than ``weights``: phases have different bottlenecks.
    ``rounding`` is how weights of decoders are rounded (building/rounding.py; None: GPTQ for 4 bits, nearest for 8);
    ``rotate`` and ``smooth`` rid their activations of outliers before that, without a change in what is computed.
    ``encoder`` is the form of an encoder's linear layers where it is another than a decoder's; of the engine openvino.
    ``prepacked`` stores weights in the engine's own layout too, so that processes share them (building/prepacking.py).
    The engine cuda is ONNX Runtime with its CUDA provider.
    ``compute`` is what all that has no form of its own is computed in, of the engines tensorrt and cuda. ``fp8`` says
    where scales come from, ``compiler`` what makes a plan of the graph (None: nothing does); of the engine tensorrt.
    """

    name: str
    summary: str
    engine: Literal["onnxruntime", "openvino", "tensorrt", "cuda"]
    weights: Weights
    prefill: Weights | None = None
    scoring: Weights | None = None
    encoder: Weights | None = None
    embedding: Storage = Storage()
    head: Storage = Storage()
    requires: Requires = Requires()
    rounding: RoundingMethod | None = None
    rotate: bool = False
    smooth: bool = False
    prepacked: bool = False
    fp8: Fp8 = Fp8()
    compute: Literal["fp32", "fp16"] = "fp32"
    compiler: Compiler | None = None
    session: SessionOptions = SessionOptions()
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _keys_fit_the_engine(self) -> Self:
        others = ("prefill", "scoring", "embedding", "head", "rounding", "rotate", "smooth", "prepacked")
        compiled = ("fp8", "compute", "compiler")
        strange = {
            "onnxruntime": ("encoder", *compiled),
            "openvino": (*others, *compiled),
            "tensorrt": (*others, "encoder"),
            "cuda": ("prefill", "scoring", "encoder", "rotate", "smooth", "prepacked", "rounding", "fp8", "compiler"),
        }[self.engine]
        for name in strange:
            if name in self.model_fields_set:
                raise ValueError(f"engine = {self.engine!r} does not take {name}")
        forms = (self.weights, self.prefill, self.scoring, self.encoder)
        if any(form is not None and (form.scheme == "fp8") and (self.engine != "tensorrt") for form in forms):
            raise ValueError("scheme = 'fp8' goes with engine = 'tensorrt'")
        if self.engine == "tensorrt" and self.weights.scheme not in ("fp8", "fp32"):
            raise ValueError("scheme = 'fp8' goes with engine = 'tensorrt', or fp32, which leaves weights to compute")
        if self.engine == "cuda" and (self.compute != "fp16" or self.weights.scheme not in ("fp32", "weight-only")):
            raise ValueError("engine = 'cuda' goes with compute = 'fp16' and scheme = 'fp32' or 'weight-only'")
        if self.engine == "tensorrt" and self.weights.scheme != "fp8" and "fp8" in self.model_fields_set:
            raise ValueError("fp8 says where scales come from, and scheme = 'fp32' has none: leave it out")
        if self.engine == "openvino" and self.weights.scheme == "w8a8-static":
            raise ValueError("engine = 'openvino' has no scheme w8a8-static: use w8a8, whose ranges it calibrates")
        if (self.rounding or self.rotate or self.smooth) and self.weights.scheme == "fp32":
            raise ValueError("rounding, rotate and smooth prepare weights for fewer bits, and scheme = 'fp32' has all")
        per_channel = self.weights.scheme == "weight-only" and self.weights.bits == 8
        if self.engine == "openvino" and per_channel and "block_size" in self.weights.model_fields_set:
            raise ValueError("engine = 'openvino' has one scale per channel at 8 bits: leave block_size out")
        return self


def load_profile(name: str) -> Profile:
    """The shipped profile of that name, or the file when ``name`` has a separator or ends in .toml."""
    return load_named(name, "profiles", Profile)


def list_profiles() -> list[Profile]:
    """Every shipped profile by name."""
    return [load_profile(path.stem) for path in sorted(shipped("profiles").glob("*.toml"))]
