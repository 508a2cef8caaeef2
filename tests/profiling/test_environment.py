"""Counters of the machine: read where they are, None where they are not."""

import os

from slmdeploy.profiling.environment import cpu_ticks, energy_joules, steal_share, surroundings


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
    assert energy_joules(tmp_path) is None
    for zone, value in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 7_000_000)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
    assert energy_joules(tmp_path) == 2.5
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("denied")
    assert energy_joules(tmp_path) is None


def test_surroundings_tell_where_the_process_may_run():
    found = surroundings()
    assert found["affinity"] is None or len(found["affinity"]) <= (os.cpu_count() or 1)
    assert found["load_average"] is None or found["load_average"] >= 0
