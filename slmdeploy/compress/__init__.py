"""From a large checkpoint to a small one: prune (structured, one shot) and distil (white box, from teacher logits).

`prune.prune` and `distill.distill` are the verbs; both read and write ordinary Hugging Face checkpoints. depth.py
decides which layers go and importance.py which groups, calibration.py walks the layers, surgery.py cuts; losses.py
compares two sets of logits, data.py packs records into rows, training.py drives the transformers Trainer. This folder
knows nothing of graphs, engines or deployment, and it and export/ are the only ones that import torch.
"""
