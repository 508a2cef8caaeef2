"""session.py: which CPUs need the slower, exact products of 8-bit numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmdeploy.runtime import session


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    session.has_exact_products.cache_clear()
    yield
    session.has_exact_products.cache_clear()


@pytest.mark.parametrize(
    ("machine", "features", "flags", "exact"),
    [
        ("x86_64", {"AVX512VNNI": True, "AVX512F": True}, {"avx512_vnni", "avx512f"}, True),
        ("x86_64", {"AVX512VNNI": False, "AVX512F": True}, {"avx512f"}, False),
        ("x86_64", {"AVX512VNNI": False, "AVX512F": False}, {"avx2"}, False),
        ("x86_64", {"AVX512VNNI": False, "AVX512F": False}, {"avx2", "avx_vnni"}, True),
        ("x86_64", {"AVX512VNNI": False, "AVX512F": False}, {"avx2", "avx_vnni", "avx512f", "avx512_vnni"}, False),
        ("AMD64", {}, set(), False),
        ("aarch64", {}, set(), True),
    ],
    ids=["AVX512-VNNI", "AVX-512 alone", "AVX2", "AVX-VNNI", "emulated on a newer CPU", "unknown x86", "Arm"],
)
def test_which_cpus_multiply_exactly_by_themselves(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: dict[str, bool], flags: set[str], exact: bool
) -> None:
    monkeypatch.setattr(session.platform, "machine", lambda: machine)
    monkeypatch.setattr(session, "_FEATURES", features)
    monkeypatch.setattr(session, "_linux_flags", lambda: frozenset(flags))
    assert session.has_exact_products() is exact


def test_the_flags_of_linux_are_read(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 avx_vnni\nbugs : x\n")
    assert session._linux_flags(cpuinfo) == {"fpu", "avx2", "avx_vnni"}
    assert session._linux_flags(tmp_path / "none") == frozenset()


def test_numpy_still_tells_what_the_processor_has() -> None:
    assert isinstance(session._FEATURES.get("AVX2", False), bool)
    assert {"AVX512VNNI", "AVX512F"} <= set(session._FEATURES) or session.platform.machine() == "aarch64"
