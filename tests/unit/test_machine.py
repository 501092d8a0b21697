"""Do limits that a container sets count as the machine's own?"""

import os
from pathlib import Path

import psutil
import pytest

from baton import machine


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/fs/cgroup, with this process in the version 2 group /a/b, and 64 cores."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_MEMBERSHIP", membership)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return tmp_path


def test_without_limits_affinity_counts(cgroups: Path) -> None:
    (cgroups / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (cgroups / "a" / "b" / "memory.max").write_text("max\n")
    assert machine.usable_cores() == 64
    assert machine.available_bytes() > 0


def test_the_tightest_quota_up_the_tree_counts(cgroups: Path) -> None:
    (cgroups / "a" / "cpu.max").write_text("250000 100000\n")
    (cgroups / "a" / "b" / "cpu.max").write_text("800000 100000\n")
    assert machine.usable_cores() == 3


def test_a_quota_below_one_core_is_one_core(cgroups: Path) -> None:
    (cgroups / "cpu.max").write_text("10000 100000\n")
    assert machine.usable_cores() == 1


def test_version_1_quotas_count(cgroups: Path) -> None:
    (cgroups / "membership").write_text("3:memory:/pod\n2:cpu,cpuacct:/pod\n")
    folder = cgroups / "cpu,cpuacct" / "pod"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("400000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.usable_cores() == 4


def test_cores_are_ours_to_choose_unless_a_quota_allows_fewer(cgroups: Path) -> None:
    assert machine.own_cores() == tuple(range(64))
    (cgroups / "a" / "cpu.max").write_text("250000 100000\n")
    assert machine.own_cores() == ()


@pytest.mark.parametrize(("text", "cores"), [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), ("5,2-2", {2, 5})])
def test_lists_of_cores_are_read_as_the_kernel_writes_them(text: str, cores: set[int]) -> None:
    assert machine.read_cores(text) == cores
    assert machine.read_cores(machine.list_cores(cores)) == cores


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        machine.read_cores(text)


def test_memory_that_the_group_has_left_counts(cgroups: Path) -> None:
    (cgroups / "a" / "memory.max").write_text("3000\n")
    (cgroups / "a" / "memory.current").write_text("1000\n")
    assert machine.available_bytes() == 2000


def test_a_limit_above_what_is_free_changes_nothing(cgroups: Path) -> None:
    (cgroups / "memory.max").write_text(str(1 << 62))
    (cgroups / "memory.current").write_text("0")
    assert machine.available_bytes() < psutil.virtual_memory().total
