"""Installed engines and those that are in each other's way."""

from slmdeploy.profiling.engines import clashes, engines, has_engine, installed


def test_what_is_installed_has_a_version():
    assert installed(["numpy", "no-such-package"]).keys() == {"numpy"}
    assert "onnxruntime" in engines()


def test_any_flavour_is_the_engine():
    assert has_engine("onnxruntime", {"onnxruntime-gpu": "1.31"})
    assert has_engine("tensorrt", {"tensorrt": "11"})
    assert not has_engine("openvino", {"onnxruntime-openvino": "1.31"})


def test_clash_of_flavours_gives_the_command():
    assert clashes({"onnxruntime": "1.31.1", "openvino": "2026.4"}) == ()
    (problem,) = clashes({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"})
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime==1.31.1" in problem


def test_each_engine_has_its_own_clash():
    problems = clashes({"onnxruntime": "1", "onnxruntime-qnn": "1", "openvino": "2", "openvino-nightly": "3"})
    assert [problem.split()[0] for problem in problems] == ["onnxruntime", "openvino"]
