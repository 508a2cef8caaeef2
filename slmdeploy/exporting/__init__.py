"""From a checkpoint to an ONNX graph, on the torch side: export.py is the verb.

spec.py reads what a model computes, rope.py its rotary tables, dialect.py emits operators, decoder.py puts them
together, parity.py proves the result against eager.py, the same checkpoint in torch.
"""
