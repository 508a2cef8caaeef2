"""A machine and targets for tests of what matches what."""

from slmdeploy.profiling.hardware import Machine
from slmdeploy.specs import Target

MACHINE = Machine(
    system="Linux",
    arch="x86_64",
    cpu="x",
    isa=frozenset({"avx2", "fma"}),
    physical_cores=4,
    logical_cores=8,
    affinity_cores=8,
    quota_cores=None,
    memory_bytes=100,
    memory_limit_bytes=None,
    read_bandwidth_bytes_per_s=1e10,
    python="3.11",
    engines={"onnxruntime": "1.31.1"},
)


def target(name, isa=(), arch="x86_64", engines=("onnxruntime",), **facts):
    return Target(name=name, summary="", kind="cpu", arch=arch, isa=isa, engines=engines, **facts)


def gpu_target(name, capability):
    return Target(name=name, summary="", kind="gpu", compute_capability=capability, engines=("tensorrt",))
