"""The verb `doctor`: what this machine is, which target it matches, what can be built here, and what is amiss.

The machine is hardware.py's; here it meets the profiles. Changes nothing on the machine: a problem is a sentence with
the command that mends it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from slmdeploy.profiling.engines import has_engine
from slmdeploy.profiling.hardware import Machine, detect, match_gpus, match_target
from slmdeploy.specs import Profile, Target


def doctor(targets: Sequence[Target], profiles: Sequence[Profile], *, bench: bool = True) -> dict[str, Any]:
    """The report of `slmdeploy doctor`: machine, target and why, GPUs, profiles and why (not), problems."""
    machine = detect(bench=bench)
    target, reason = match_target(machine, targets)
    return {
        "machine": machine.to_dict(),
        "target": target.name if target else None,
        "target_reason": reason,
        "gpus": match_gpus(machine, targets),
        "profiles": [
            {"name": profile.name, "buildable": ok, "reason": why}
            for profile, ok, why in buildable(profiles, machine, target)
        ],
        "problems": list(machine.problems),
    }


def buildable(profiles: Sequence[Profile], machine: Machine, target: Target | None) -> list[tuple[Profile, bool, str]]:
    """For each profile whether it can be built and run here, and why (not); a slow one can, and the reason says so.

    Where the system does not tell its instruction set, the target's counts.
    """
    isa = machine.isa if machine.isa is not None else frozenset(target.isa if target else ())
    return [(profile, *_judge(profile, isa, machine.engines, target)) for profile in profiles]


def _package(profile: Profile) -> str:
    """What is installed for the profile's engine."""
    if profile.compiler is not None:
        return profile.compiler.module.replace("_", "-")
    return "onnxruntime-gpu" if profile.engine == "cuda" else profile.engine


def _judge(
    profile: Profile, isa: frozenset[str], engines: Mapping[str, str], target: Target | None
) -> tuple[bool, str]:
    missing = [flag for flag in profile.requires.isa if flag not in isa]
    if missing:
        return False, f"needs {', '.join(missing)}, which this machine does not have"
    if target is not None and profile.engine not in target.engines:
        return False, f"{profile.engine} does not run on {target.name}, which has {', '.join(target.engines)}"
    engine = _package(profile)
    if not has_engine(engine, engines):
        return False, f"{engine} is not installed: pip install {engine}"
    fast = profile.requires.slow_without
    slow = fast and isa.isdisjoint(fast)
    return True, f"runs, but slowly without {' or '.join(fast)}" if slow else "all it needs is here"
