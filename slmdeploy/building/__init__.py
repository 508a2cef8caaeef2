"""From a graph to builds for hardware: quantisation, gates, and the derivation of the scoring graph. Needs no torch."""

from slmdeploy.extras import require

require("build", "onnx", "onnx_ir")
