"""From a large checkpoint to a small one: prune (structured) and distil (white box, from a teacher's outputs).

`prune.prune` and `distill.distill` are the verbs, and for encoders `encoder_verbs.finetune` and `distill_encoder`; all
read and write ordinary Hugging Face checkpoints. depth.py decides which layers go and importance.py which groups,
calibration.py walks the layers, surgery.py cuts; losses.py compares two sets of logits, data.py and packing.py make
rows of records, training.py drives the transformers Trainer. This folder knows nothing of graphs, engines or
deployment, and it and exporting/ are the only ones that import torch.
"""
