"""The ground floor: opens, verifies and runs a build with numpy, onnxruntime and tokenizers, and nothing else.

Exactly this folder goes into an edge package, so it uses relative imports only and knows nothing of how a build is
made.
"""
