"""Sessions and clients without processes: known service times, on clocks that nobody waits for."""

from slmdeploy.profiling.measure import Effort, Runner, measure
from slmdeploy.profiling.worker import answer

QUICK = Effort(rounds=5, seconds=0.5, limit_s=1.0, precision=0.05)


class Local:
    """A client without a process; writes who was asked what into a shared log."""

    def __init__(self, session, log=None, name=""):
        self.session, self.log, self.name = session, log if log is not None else [], name

    def ask(self, op, **fields):
        self.log.append((self.name, op, fields))
        return answer(self.session, {"op": op, **fields}, self.session.clock)


def run(workload, *, effort=QUICK, watch=(), journal=None, sizes=None, **sessions):
    """Outcomes by name of sessions under a workload."""
    log = []
    runners = [
        Runner(name, Local(session, log, name), (sizes or {}).get(name, 0.0)) for name, session in sessions.items()
    ]
    found = measure(runners, workload, vocab_size=64, effort=effort, seed=0, watch=watch, journal=journal)
    return found, log
