"""Logits by one of optimum's classes: {folder, class, inputs} -> {logits}; the inputs by name, as nested lists."""

import json
import sys

import torch
from optimum import onnxruntime

question = json.load(sys.stdin)
model = getattr(onnxruntime, question["class"]).from_pretrained(question["folder"])
inputs = {name: torch.tensor(values) for name, values in question["inputs"].items()}
print(json.dumps({"logits": model(**inputs).logits.tolist()}))
