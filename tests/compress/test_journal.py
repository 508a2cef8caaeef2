"""The journal of a pruning: kept through a kill, thrown away when it is done, of another plan, or of no use."""

from pathlib import Path

import pytest
import torch

from slmdeploy.compress.journal import journal
from slmdeploy.errors import InputError

TENSOR = torch.arange(6.0).reshape(2, 3).T  # not contiguous


def leave(out: Path, key: str, error: BaseException) -> None:
    """Write two entries and end as ``error`` does."""
    with journal(out, key) as notes:
        assert notes.read("layer-0") is None
        notes.write("layer-0", {"kept": [1, 2]}, {"attention": TENSOR})
        notes.write("costs", [0.1, 0.25])
        raise error


def test_entries_outlive_a_kill_and_no_more(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        leave(tmp_path / "out", "key", KeyboardInterrupt())
    with journal(tmp_path / "out", "key") as notes:
        found = notes.read("layer-0")
        assert found is not None
        assert found[0] == {"kept": [1, 2]}
        assert torch.equal(found[1]["attention"], TENSOR)
        assert notes.read("costs") == ([0.1, 0.25], {})
    assert not any(tmp_path.iterdir())


def test_another_key_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        leave(tmp_path / "out", "one", KeyboardInterrupt())
    with journal(tmp_path / "out", "two") as notes:
        assert notes.read("costs") is None


def test_what_would_fail_again_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        leave(tmp_path / "out", "key", InputError("no"))
    assert not any(tmp_path.iterdir())
