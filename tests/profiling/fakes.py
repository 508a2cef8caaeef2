"""Sessions and clients without processes: known service times, on clocks that nobody waits for."""

from pathlib import Path

from slmdeploy.profiling.measure import Effort, Runner, measure
from slmdeploy.profiling.worker import FakeSession, answer

QUICK = Effort(rounds=5, seconds=0.5, limit_s=1.0, precision=0.05)


class Local:
    """A client without a process; writes who was asked what into a shared log."""

    def __init__(self, session, log=None, name=""):
        self.session, self.log, self.name = session, log if log is not None else [], name

    def ask(self, op, **fields):
        self.log.append((self.name, op, fields))
        return answer(self.session, {"op": op, **fields}, self.session.clock)


def paced(folder, options):
    """The session of a fake build, whose pace is in pace.txt, and what it says of itself when it is ready."""
    pace = float((Path(folder) / "pace.txt").read_text())
    session = FakeSession(prefill_s=0.01 * pace, step_s=0.002 * pace, item_s=0.001 * pace, vocab_size=30)
    if "--spinning" in options:  # one thread is the best of this model
        session.step_s *= 0.5 if options[options.index("--threads") + 1] == "1" else 1.5
    return session, {"ready": True, "load_s": 0.5 * pace}


class Inside(Local):
    """A worker of a fake build that is no process, and so starts at once: `command` is [python, script, folder, …]."""

    def __init__(self, name, command, *, threads):
        session, self.hello = paced(command[2], command[3:])
        super().__init__(session, name=name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing is left to end."""


def run(workload, *, effort=QUICK, watch=(), journal=None, sizes=None, **sessions):
    """Outcomes by name of sessions under a workload."""
    log = []
    runners = [
        Runner(name, Local(session, log, name), (sizes or {}).get(name, 0.0)) for name, session in sessions.items()
    ]
    found = measure(runners, workload, vocab_size=64, effort=effort, seed=0, watch=watch, journal=journal)
    return found, log
