"""One stage with sharded parameters on the CPU: as distill_once.py, in processes of `accelerate launch --use_fsdp`.

accelerate shards on accelerators alone and trains data-parallel on the CPU, where torch's fully_shard runs over gloo
all the same. So these processes are declared to be of a kind that accelerate shards; all else is as on a GPU. With
STOP_BEFORE_STEP in the environment they end there, as if they had been stopped.
"""

import os
import runpy
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from slmdeploy.compress.training import Distiller

STOPPED = 33
_begin, _compute = PartialState.__init__, Distiller.compute_loss
_stop = int(os.environ.get("STOP_BEFORE_STEP", "0"))


def _declared(self: PartialState, *args: Any, **kwargs: Any) -> None:
    _begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def _until_stopped(self: Distiller, *args: Any, **kwargs: Any) -> Tensor:
    if self.state.global_step + 1 == _stop:
        sys.exit(STOPPED)
    return _compute(self, *args, **kwargs)


if __name__ == "__main__":
    PartialState.__init__ = _declared  # type: ignore[method-assign]
    Distiller.compute_loss = _until_stopped  # type: ignore[method-assign]
    runpy.run_module("tests.compress.distill_once", run_name="__main__")
