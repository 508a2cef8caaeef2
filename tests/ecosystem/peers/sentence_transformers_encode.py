"""Vectors of texts, or scores of pairs, by sentence-transformers over ONNX: {folder, texts} or {folder, pairs}."""

import json
import sys

from sentence_transformers import CrossEncoder, SentenceTransformer

question = json.load(sys.stdin)
if "pairs" in question:
    encoder = CrossEncoder(question["folder"], backend="onnx")
    answer = {"scores": encoder.predict([tuple(pair) for pair in question["pairs"]]).tolist()}
else:
    model = SentenceTransformer(question["folder"], backend="onnx")
    answer = {"vectors": model.encode(question["texts"]).tolist()}
print(json.dumps(answer))
