"""One stage in a process of its own: TEACHER STUDENT DATA OUT and the stage's fields as JSON."""

import json
import sys
from pathlib import Path

from slmdeploy.compress.distill import distill
from slmdeploy.specs import distill_stage

if __name__ == "__main__":
    teacher, student, data, out, fields = sys.argv[1:]
    distill(teacher, student, out=Path(out), data=Path(data), stage=distill_stage(**json.loads(fields)))
