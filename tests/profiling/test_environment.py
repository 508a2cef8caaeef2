"""Counters of the machine: read where they are, None where they are not."""

import ctypes
import os

from slmdeploy.profiling.environment import (
    cpu_ticks,
    energy_joules,
    nvml_joules,
    rapl_joules,
    steal_share,
    surroundings,
)


def test_steal(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 10 70 0 0 0 10 0 0\n")
    before = cpu_ticks(stat)
    stat.write_text("cpu  20 0 20 130 0 0 0 30 0 0\n")
    assert steal_share(before, cpu_ticks(stat)) == 0.2
    assert cpu_ticks(tmp_path / "none") is None
    assert steal_share(None, None) is None
    assert steal_share(before, before) == 0.0


def test_energy_is_the_sum_of_packages_and_absent_where_it_cannot_be_read(tmp_path):
    assert rapl_joules(tmp_path) is None
    for zone, value in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 7_000_000)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
    assert rapl_joules(tmp_path) == 2.5
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("denied")
    assert rapl_joules(tmp_path) is None


def test_surroundings_tell_where_the_process_may_run():
    found = surroundings()
    assert found["affinity"] is None or len(found["affinity"]) <= (os.cpu_count() or 1)
    assert found["load_average"] is None or found["load_average"] >= 0


class Nvml:
    """NVIDIA's management library as far as it is called, with GPUs of known energy in millijoules."""

    def __init__(self, energies, readable=True):
        self.energies, self.readable = energies, readable

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = len(self.energies)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):  # noqa: N802
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, energy):  # noqa: N802
        energy._obj.value = self.energies[ctypes.c_void_p(device.value).value - 1]
        return 0 if self.readable else 3


def test_energy_of_gpus_is_theirs_together_and_absent_where_one_does_not_tell():
    assert nvml_joules(Nvml([1500, 2500])) == 4.0
    assert nvml_joules(Nvml([1500], readable=False)) is None
    assert nvml_joules(Nvml([])) is None
    assert nvml_joules(None) is None


def test_energy_without_any_counter_is_no_energy(monkeypatch, tmp_path):
    monkeypatch.setattr("slmdeploy.profiling.environment.rapl_joules", lambda: None)
    monkeypatch.setattr("slmdeploy.profiling.environment._nvml", lambda: Nvml([2000]))
    assert energy_joules() == 2.0
    monkeypatch.setattr("slmdeploy.profiling.environment._nvml", lambda: None)
    assert energy_joules() is None
