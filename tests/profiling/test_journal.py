"""What was measured survives an interruption, and nothing of another measurement is taken for it."""

from slmdeploy.profiling.journal import Journal
from slmdeploy.profiling.summary import Turn

TURN = Turn({"service_ms": [1.0, 2.0]}, units=3, requests=2, answered=2, wall_s=0.5)


def test_turns_are_restored_under_the_same_key_only(tmp_path):
    file = tmp_path / "journal"
    with Journal(file, "key") as journal:
        journal.put(("w", "a", 0), TURN)
        journal.put_note("a", {"options": 3})
    with Journal(file, "key") as journal:
        assert journal.get(("w", "a", 0)) == TURN
        assert journal.get(("w", "a", 1)) is None
        assert journal.note("a") == {"options": 3}
    with Journal(file, "other") as journal:
        assert journal.get(("w", "a", 0)) is None


def test_a_line_that_was_cut_short_is_left_out_and_does_not_harm_what_follows(tmp_path):
    file = tmp_path / "journal"
    with Journal(file, "key") as journal:
        journal.put(("w", "a", 0), TURN)
    with file.open("a") as stream:
        stream.write('{"workload": "w", "cand')
    with Journal(file, "key") as journal:
        journal.put(("w", "a", 1), TURN)
    with Journal(file, "key") as journal:
        assert [journal.get(("w", "a", n)) for n in (0, 1)] == [TURN, TURN]


def test_a_turn_that_is_forgotten_is_measured_again(tmp_path):
    file = tmp_path / "journal"
    later = Turn({"service_ms": [9.0]}, units=1, requests=1, answered=1, wall_s=0.1)
    with Journal(file, "key") as journal:
        journal.put(("w", "a", 0), TURN)
        journal.forget(("w", "a", 0))
        assert journal.get(("w", "a", 0)) is None
        journal.put(("w", "a", 0), later)
    with Journal(file, "key") as journal:
        assert journal.get(("w", "a", 0)) == later


def test_without_a_file_nothing_is_written():
    with Journal(None, "key") as journal:
        journal.put(("w", "a", 0), TURN)
        assert journal.get(("w", "a", 0)) == TURN
