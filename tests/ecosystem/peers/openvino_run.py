"""Logits by OpenVINO on the CPU: {graph, runs, past} -> {logits}, the present of one run being the past of the next.

A run has every input of the graph by name but the past, as nested lists; `past` in the question has the shape of each
empty past by name.
"""

import json
import sys

import numpy as np
import openvino

question = json.load(sys.stdin)
# Without the hint OpenVINO computes in bfloat16 where the CPU can.
compiled = openvino.Core().compile_model(question["graph"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
past = {name: np.zeros(shape, np.float32) for name, shape in question["past"].items()}
logits = []
for run in question["runs"]:
    inputs = {name: np.array(values, np.int64) for name, values in run.items()}
    outputs = {value.get_any_name(): array for value, array in compiled(inputs | past).items()}
    logits.append(outputs["logits"].tolist())
    past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
print(json.dumps({"version": openvino.__version__, "logits": logits}))
