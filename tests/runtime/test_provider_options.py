"""provider.json: what is read back, which options come of it, where engines are kept, and hostile files."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.errors import CorruptArtifactError, ResourceError
from slmdeploy.runtime import provider_options
from slmdeploy.runtime.provider_options import FILE, ProviderOptions, engine_place, read_options, write_options
from slmdeploy.runtime.tensorrt_plan import Phase

PROMPTS = Phase("prefill", {"input_ids": ((1, 1), (1, 48), (1, 192)), "past.0": ((1, 2, 0, 8),) * 3})
STEPS = Phase("decode", {"input_ids": ((1, 1),) * 3, "past.0": ((1, 2, 0, 8), (1, 2, 56, 8), (1, 2, 191, 8))})
OPTIONS = ProviderOptions(1 << 30, 3, (PROMPTS, STEPS))


def test_shapes_are_written_as_the_providers_read_them_and_no_option_says_a_precision() -> None:
    found = OPTIONS.of("decode", "tensorrt", Path("/cache"))
    assert found["trt_profile_min_shapes"] == "input_ids:1x1,past.0:1x2x0x8"
    assert found["trt_profile_opt_shapes"] == "input_ids:1x1,past.0:1x2x56x8"
    assert found["trt_profile_max_shapes"] == "input_ids:1x1,past.0:1x2x191x8"
    assert found["trt_builder_optimization_level"] == "3"
    assert not [name for name in found if "fp16" in name or "int8" in name or "bf16" in name]
    prompts = OPTIONS.of("prefill", "tensorrt_rtx", Path("/cache"))
    assert prompts["nv_profile_opt_shapes"] == "input_ids:1x48,past.0:1x2x0x8"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_options(tmp_path, OPTIONS)
    assert read_options(tmp_path) == OPTIONS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format must be an integer from 1 to 1"),
        ({"workspace_bytes": 0}, "workspace_bytes must be an integer"),
        ({"level": 6}, "level must be an integer from 0 to 5"),
        ({"phases": [{"name": "decode", "shapes": {}}]}, "phases must be the phases prefill and decode"),
        ({"command": "rm"}, "the key command is not known"),
        (
            {"phases": [{"name": "prefill", "shapes": {}}, {"name": "decode", "shapes": {"a,b:1": [[1], [1], [1]]}}]},
            "an input cannot be named 'a,b:1'",
        ),
    ],
)
def test_hostile_options_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / FILE).write_text(json.dumps(OPTIONS.to_json() | change))
    with pytest.raises(CorruptArtifactError, match=message):
        read_options(tmp_path)


def test_engines_of_other_weights_or_conditions_have_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMDEPLOY_CACHE", str(tmp_path))
    places = {
        engine_place({"model.onnx": graph}, {"phase": phase}) for graph in ("a", "b") for phase in ("decode", "prefill")
    }
    assert len(places) == 4
    assert engine_place({"model.onnx": "a"}, {"phase": "decode"}) in places
    assert {place.stat().st_mode & 0o077 for place in places} == {0}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLMDEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"cannot be made .* set SLMDEPLOY_CACHE to another place"):
        engine_place({}, {})


def test_the_cache_is_the_users_own() -> None:
    assert provider_options.cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/slmdeploy/engines")
    assert provider_options.cache_folder({}) == Path.home() / ".cache" / "slmdeploy" / "engines"
