"""What can be built where, and why not; the report."""

from dataclasses import replace

import pytest

from slmdeploy.profiling import doctor as module
from slmdeploy.profiling.doctor import buildable, doctor
from slmdeploy.specs import Profile
from tests.profiling.machines import MACHINE, gpu_target, target


def profile(isa=(), slow_without=()):
    return Profile.model_validate(
        {
            "name": "p",
            "summary": "",
            "engine": "onnxruntime",
            "weights": {"scheme": "fp32"},
            "requires": {"isa": isa, "slow_without": slow_without},
        }
    )


AVX2, VNNI = target("avx2", ["avx2"]), target("vnni", ["avx2", "avx512_vnni"])


@pytest.mark.parametrize(
    ("wanted", "changes", "ok", "why"),
    [
        (profile(["avx2"]), {}, True, "all it needs is here"),
        (profile(["avx512_vnni"]), {}, False, "needs avx512_vnni, which this machine does not have"),
        (profile(slow_without=["avx512_vnni"]), {}, True, "runs, but slowly without avx512_vnni"),
        (profile(slow_without=["avx512_vnni", "x"]), {}, True, "runs, but slowly without avx512_vnni or x"),
        (profile(slow_without=["avx512_vnni", "avx2"]), {}, True, "all it needs is here"),
        (profile(), {"engines": {}}, False, "onnxruntime is not installed: pip install onnxruntime"),
        (profile(), {"engines": {"onnxruntime-gpu": "1.31"}}, True, "all it needs is here"),
        (profile(["avx2"]), {"isa": None}, True, "all it needs is here"),
    ],
)
def test_buildable(wanted, changes, ok, why):
    assert buildable([wanted], replace(MACHINE, **changes), AVX2) == [(wanted, ok, why)]


def test_an_engine_that_the_target_lacks():
    ((_, ok, why),) = buildable([profile()], MACHINE, gpu_target("gpu", "9.0"))
    assert (ok, why) == (False, "onnxruntime does not run on gpu, which has tensorrt")


def test_doctor_names_target_profiles_and_problems(monkeypatch):
    asked = []

    def detect(*, bench):
        asked.append(bench)
        return replace(MACHINE, problems=("two flavours",))

    monkeypatch.setattr(module, "detect", detect)
    report = doctor([AVX2, VNNI], [profile(["avx512_vnni"])], bench=False)
    assert asked == [False]
    assert (report["target"], report["target_reason"]) == ("avx2", "x86_64 with avx2")
    assert report["profiles"] == [
        {"name": "p", "buildable": False, "reason": "needs avx512_vnni, which this machine does not have"}
    ]
    assert report["problems"] == ["two flavours"]
    assert report["machine"]["isa"] == ["avx2", "fma"]
