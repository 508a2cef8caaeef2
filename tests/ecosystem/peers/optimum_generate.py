"""Logits and greedy generation by optimum: {folder, file_name, prompts, max_new_tokens} -> {logits, alone, batch}.

`logits` are those of every position of the first prompt, `alone` has the new tokens of each prompt run by itself,
`batch` those of all in one batch, padded on the left.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM

question = json.load(sys.stdin)
model = ORTModelForCausalLM.from_pretrained(question["folder"], file_name=question["file_name"])
# It takes this for hidden_size / num_attention_heads, which is not so where the config says otherwise (Qwen3).
model.embed_size_per_head = getattr(model.config, "head_dim", None) or model.embed_size_per_head


def generate(prompts: list[list[int]]) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    count = question["max_new_tokens"]
    made = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return made[:, width:].tolist()


first = torch.tensor([question["prompts"][0]])
logits = model(input_ids=first, attention_mask=torch.ones_like(first)).logits[0].tolist()
alone = [generate([prompt])[0] for prompt in question["prompts"]]
print(json.dumps({"logits": logits, "alone": alone, "batch": generate(question["prompts"])}))
