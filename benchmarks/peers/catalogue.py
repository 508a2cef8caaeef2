"""The engines of the comparison as a table: environment, module, options, and how many bits stand where.

A new engine is a row here and a module in engines/. Our own rows come from the shipped profiles, so a new profile is
compared without a change here. Bits are what is stated beside every figure: like for like is read from them.
"""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.shapes import Shape
from slmdeploy.building.quantize import stored
from slmdeploy.specs import Profile, Weights, list_profiles


@dataclass(frozen=True)
class Environment:
    """What pip installs into an environment of its own, in this order, and with which variables."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """What is taken out again: other packages ask for it, nothing here uses it, and it breaks beside this torch."""


OURS = "slmdeploy"
_TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "genai": Environment(
        (_TORCH, "onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "transformers==5.23.0", "onnx==1.23.2",
         "onnx-ir==1.1.0")
    ),
    "ovgenai": Environment((_TORCH, "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0",
         "transformers==5.5.4"), without=("torchvision",)),
    "llamacpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf"),
        ("--no-binary", "llama-cpp-python"),
        # GCC 12 takes the stores of the AMX tile configuration for dead and llama.cpp then crashes
        # (ggml-org/llama.cpp issue 20824, pull request 26954); without these passes it runs.
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse' -DLLAMA_BUILD_TOOLS=OFF"},
    ),
    "ct2": Environment((_TORCH, "ctranslate2==4.8.5", "transformers==4.57.6")),
    "optimum": Environment((_TORCH, "optimum-onnx==0.1.0", "onnxruntime==1.31.1", "transformers==4.57.6")),
    "zentorch": Environment((_TORCH, "zentorch==2.13.0.2", "transformers==5.23.0")),
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How an engine holds a model: what is stated beside its figures, and what its share of a limit is taken from."""

    linear_bits: float
    head_bits: float
    """Bits of a stored weight with its share of scales."""
    bits: str
    """Linear layers / head / embedding."""
    cache: str
    activations: str
    arithmetic: str = "int8"
    """Of prompts: int8, bf16 or fp32, whose measured peak the figures are compared with."""


@dataclass(frozen=True)
class Peer:
    """One row of the comparison. ``environment`` None is this one; ``weight_bits`` is the class for like for like."""

    name: str
    module: str
    environment: str | None
    weight_bits: int
    form: Form
    options: dict[str, Any] = field(default_factory=dict)
    scoring: str = ""
    """How it scores items: what of the prefix it computes again."""
    models: str = "decoder"
    is_ours: bool = False

    def runs(self, shape: Shape) -> bool:
        """Whether it is a row for this kind of model."""
        return ("decoder" if shape.is_decoder else "encoder") in self.models


CPU_ENGINES = ("onnxruntime", "openvino")
_LOOP = "prefix reused, items one by one"
_BATCH = "prefix reused, items in one batch"
_BLOCKS = "int8 in blocks"
_GGML = ("f16", "int8 in blocks of 32")
_OV = ("u8", "the engine's default")
_BF16 = Form(16, 16, "16/16/16", "bf16", "bf16", "bf16")
_BOTH = "decoder encoder"

PEERS = (
    Peer("genai-int4", "genai", "genai", 4, Form(4.25, 4.25, "4/4/32", "f32", _BLOCKS),
         {"precision": "int4", "block_size": 128, "extra": ["shared_embeddings=false"]}, _LOOP),
    Peer("genai-int8", "genai", "genai", 8, Form(8.25, 8.25, "8/8/32", "f32", _BLOCKS),
         {"precision": "int8", "block_size": 128, "extra": ["shared_embeddings=false"]}, _LOOP),
    Peer("openvino-genai-int4", "openvino_genai_", "ovgenai", 4, Form(4.25, 8, "4/8/8", *_OV), {"bits": 4},
         f"{_BATCH} by its prefix cache"),
    Peer("openvino-genai-int8", "openvino_genai_", "ovgenai", 8, Form(8, 8, "8/8/8", *_OV), {"bits": 8},
         f"{_BATCH} by its prefix cache"),
    Peer("llamacpp-q4_0", "llamacpp", "llamacpp", 4, Form(4.5, 4.5, "4/4/4", *_GGML),
         {"form": "Q4_0", "pure": True}, _BATCH),
    Peer("llamacpp-q4_k_m", "llamacpp", "llamacpp", 4, Form(4.85, 6.56, "4–6/6/6", *_GGML),
         {"form": "Q4_K_M", "pure": False}, _BATCH),
    Peer("llamacpp-q8_0", "llamacpp", "llamacpp", 8, Form(8.5, 8.5, "8/8/8", *_GGML),
         {"form": "Q8_0", "pure": False}, _BATCH),
    Peer("ctranslate2-int8", "ct2", "ct2", 8, Form(8, 8, "8/8/8", "f32", "int8 per token"),
         {"quantization": "int8"}, f"{_BATCH} by its static prompt", _BOTH),
    Peer("optimum-int8", "optimum_onnx", "optimum", 8, Form(8, 8, "8/8/8", "f32", "int8 per tensor"), {}, _LOOP, _BOTH),
    Peer("openvino-int8", "openvino_", "ovgenai", 8, Form(8, 8, "8/–/8", "–", "int8 per tensor"), {}, "", "encoder"),
    Peer("torch-bf16", "pytorch", None, 16, _BF16, {"backend": "eager"}, _BATCH, _BOTH),
    Peer("torch-bf16-compile", "pytorch", None, 16, _BF16, {"backend": "inductor"}, _BATCH, _BOTH),
    Peer("zentorch-bf16", "pytorch", "zentorch", 16, _BF16, {"backend": "zentorch"}, _BATCH, _BOTH),
)  # fmt: skip


def ik_peers(build: str) -> tuple[Peer, ...]:
    """The rows of ik_llama.cpp, whose compiled tree is ``build``; it is compiled by hand, since no package ships it."""
    rows = (("ik-q4_0", "llamacpp-q4_0", 4, Form(4.5, 4.5, "4/4/4", *_GGML)),
            ("ik-q8_0", "llamacpp-q8_0", 8, Form(8.5, 8.5, "8/8/8", *_GGML)))  # fmt: skip
    return tuple(
        Peer(name, "ik", None, bits, form, {"build": build, "source": source}) for name, source, bits, form in rows
    )


def our_peers() -> tuple[Peer, ...]:
    """A row for each shipped profile that quantises and whose engine runs on a CPU."""
    ours = (profile for profile in list_profiles() if profile.engine in CPU_ENGINES)
    return tuple(_ours(profile) for profile in ours if profile.weights.scheme != "fp32")


def _ours(profile: Profile) -> Peer:
    if profile.engine == "openvino":  # it has one form for both tables, and its profiles do not state it
        form = Form(_stored(profile.weights), 8, f"{profile.weights.bits}/8/8", "f32 or bf16", _OV[1])
    else:
        tables = f"{profile.head.bits}/{profile.embedding.bits}"
        head = _stored(stored(profile.head)) if profile.head.bits < 32 else 32
        form = Form(_stored(profile.weights), head, f"{profile.weights.bits}/{tables}", "f32", _activations(profile))
    options = {"profile": profile.name}
    scoring = "items packed behind the prefix"
    models = "decoder" if profile.prefill or profile.scoring else _BOTH
    return Peer(f"{OURS} {profile.name}", "ours", None, profile.weights.bits, form, options, scoring, models, True)


def _activations(profile: Profile) -> str:
    """Of prompts, of single tokens and of scoring, each named once."""
    forms = (profile.prefill, profile.weights, profile.scoring)
    words = [("int8 per token" if form.scheme == "w8a8" else _BLOCKS) for form in forms if form is not None]
    return ", ".join(dict.fromkeys(words))


def _stored(weights: Weights) -> float:
    """Bits of a weight with its share of scales and zero points."""
    if weights.scheme != "weight-only":
        return weights.bits
    return weights.bits + (32 + (0 if weights.symmetric else weights.bits)) / weights.block_size
