"""Sharded parameters (FSDP2 through accelerate): what its configuration must say, and the whole model of the shards.

Sharding, gathering and resuming are accelerate's and torch's; what stands here is what a distillation cannot do under
them, refused before anything is loaded. The student's weights, gradients and optimiser states are shared out among the
processes; each still holds the whole teacher, and the whole student until training starts. Imports torch only when it
runs; knows nothing of losses.
"""

import os
from typing import Any

from slmdeploy.errors import InputError
from slmdeploy.specs import DistillStage

FULL = "FULL_STATE_DICT"


def wanted() -> bool:
    """Whether `accelerate launch` was asked for sharded parameters."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_stage(stage: DistillStage) -> None:
    """Refuse what a sharded student cannot do, and a configuration whose checkpoints nobody could go on from."""
    if not wanted():
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("sharded parameters are those of FSDP2 alone: launch with --fsdp_version 2")
    if os.environ.get("FSDP_STATE_DICT_TYPE") != FULL:
        raise InputError(f"with sharded parameters a stage is saved whole: launch with --fsdp_state_dict_type {FULL}")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise InputError(
            "with fsdp_cpu_ram_efficient_loading only the first process would have the teacher's weights: launch with "
            "--fsdp_cpu_ram_efficient_loading false"
        )
    if stage.optimizer == "muon":
        raise InputError(
            "muon orthogonalises whole matrices, of which a process with sharded parameters has a part: set optimizer "
            "to adamw or leave --use_fsdp out"
        )
    if stage.on_policy > 0:
        raise InputError(
            "on_policy with sharded parameters is not supported: each process samples on its own, and a sharded "
            "student runs in all of them at once; set on_policy to 0 or leave --use_fsdp out"
        )


def refuse_for_encoders() -> None:
    """Refuse sharded parameters to the training of encoders, which are small."""
    if wanted():
        raise InputError("encoders are not trained with sharded parameters: leave --use_fsdp out")


def check_running(accelerator: Any) -> None:
    """Refuse a machine on which accelerate would train data-parallel without a word, although it was asked to shard."""
    if wanted() and not accelerator.is_fsdp2:
        raise InputError(
            "accelerate shards parameters on GPUs with several processes alone, and this training has none: leave "
            "--use_fsdp out"
        )


def whole_weights(accelerator: Any, model: Any) -> dict[str, Any]:
    """The weights of a sharded ``model`` in the first process's memory, nothing in the others'; all must call it."""
    weights: dict[str, Any] = accelerator.get_state_dict(model)
    return weights
