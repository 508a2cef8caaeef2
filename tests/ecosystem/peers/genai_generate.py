"""Greedy generation by onnxruntime-genai: {folder, prompts, max_new_tokens, text} -> {alone, batch, encoded, decoded}.

`alone` has the new tokens of each prompt run by itself, `batch` those of all in one right-padded batch.
"""

import json
import sys

import onnxruntime_genai as og


def generate(model: og.Model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    params = og.GeneratorParams(model)
    width = max(map(len, prompts))
    params.set_search_options(max_length=width + new_tokens, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, params)
    padding = question["padding"]
    rows = [prompt + [padding] * (width - len(prompt)) for prompt in prompts]
    generator.append_tokens(rows if len(rows) > 1 else rows[0])
    for _ in range(new_tokens):
        if generator.is_done():
            break
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(i)][width:] for i in range(len(prompts))]


question = json.load(sys.stdin)
model = og.Model(question["folder"])
new_tokens = question["max_new_tokens"]
answer = {
    "type": model.type,
    "alone": [generate(model, [prompt], new_tokens)[0] for prompt in question["prompts"]],
    "batch": generate(model, question["prompts"], new_tokens),
}
if "text" in question:
    tokenizer = og.Tokenizer(model)
    encoded = [int(token) for token in tokenizer.encode(question["text"])]
    answer |= {"encoded": encoded, "decoded": tokenizer.decode(encoded)}
print(json.dumps(answer))
