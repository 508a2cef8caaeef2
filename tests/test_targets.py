"""The shipped targets: they load, every figure has a source, and the instruction sets nest as the matching needs."""

import pytest

from slmdeploy.specs import Target, list_targets

TARGETS = {target.name: target for target in list_targets()}


def test_the_shipped_targets():
    assert set(TARGETS) == {
        "arm64-dotprod",
        "nvidia-ada-sm89",
        "nvidia-ampere-sm80",
        "nvidia-ampere-sm86",
        "nvidia-blackwell-sm100",
        "nvidia-hopper-sm90",
        "nvidia-jetson-orin-sm87",
        "nvidia-rtx-4090-sm89",
        "nvidia-rtx-5090-sm120",
        "x86-64-avx2",
        "x86-64-avx512-vnni",
    }
    assert set(TARGETS["x86-64-avx2"].isa) < set(TARGETS["x86-64-avx512-vnni"].isa)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_says_what_matching_needs(target):
    if target.kind == "cpu":
        assert target.arch
        assert target.isa
        assert target.compute_capability is None
    else:
        assert target.compute_capability
        assert target.memory_bytes
    assert target.engines


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_no_source_without_its_figure_and_measured_ones_say_where(target):
    for figure, source in target.sources.items():
        assert getattr(target, figure), f"{figure} has a source but no value"
        documents = "datasheet" in source or "Technical Brief" in source
        assert documents or source.startswith(("measured on ", "price list: ", "collected: "))


def test_a_price_says_of_what_and_when():
    priced = {name: target for name, target in TARGETS.items() if target.price_per_hour_usd}
    assert set(priced) == {"nvidia-ada-sm89", "nvidia-ampere-sm80", "nvidia-hopper-sm90", "x86-64-avx512-vnni"}
    assert all(target.peak_ops for target in priced.values())
    for target in priced.values():
        source = target.sources["price_per_hour_usd"]
        assert "as of 20" in source or "at commit " in source


def test_fp8_is_from_compute_capability_8_9_on():
    gpus = {name: target for name, target in TARGETS.items() if target.compute_capability}
    newer = {name for name, target in gpus.items() if float(str(target.compute_capability)) >= 8.9}
    assert {name for name, target in TARGETS.items() if "fp8" in target.peak_ops} == newer
    assert "nvidia-hopper-sm90" in newer
    assert "nvidia-ampere-sm86" not in newer


def test_a_figure_without_a_source_is_refused():
    facts = TARGETS["nvidia-ada-sm89"].model_dump()
    with pytest.raises(ValueError, match=r"sources\.peak_ops is missing"):
        Target.model_validate({**facts, "sources": {k: v for k, v in facts["sources"].items() if k != "peak_ops"}})
