"""Walks a Llama model over calibration rows, each layer seeing what the already pruned layers before it make.

Per layer it takes the Gram matrix of o_proj's inputs, has them pruned, takes that of down_proj's inputs behind the
pruned attention, has them pruned, and moves the hidden states on. Products are float32 and their sum over rows float64.
Knows nothing of how groups are chosen: that is a function it is given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

Prune = Callable[[nn.Linear, Tensor], None]


class Walk:
    """Hidden states of the calibration rows, moved through the model one pruned layer at a time.

    ``input_ids`` and ``position_ids`` are int64 [rows, length], packed as data.py does.
    """

    @torch.no_grad()
    def __init__(self, model: Any, input_ids: Tensor, position_ids: Tensor) -> None:
        self.model = model.model
        self.positions = position_ids.split(1)
        self.hidden = [self.model.embed_tokens(row) for row in input_ids.split(1)]

    @torch.no_grad()
    def step(self, layer: Any, prune_attention: Prune, prune_mlp: Prune) -> None:
        """Prune ``layer`` in place with both functions, each given its linear layer and its inputs' Gram matrix."""
        contexts = [self._context(layer, hidden, at) for hidden, at in zip(self.hidden, self.positions, strict=True)]
        prune_attention(layer.self_attn.o_proj, gram(contexts))
        middles = [h + layer.self_attn.o_proj(c) for h, c in zip(self.hidden, contexts, strict=True)]
        del contexts
        neurons = [self._neurons(layer, middle) for middle in middles]
        prune_mlp(layer.mlp.down_proj, gram(neurons))
        self.hidden = [m + layer.mlp.down_proj(n) for m, n in zip(middles, neurons, strict=True)]

    def _context(self, layer: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        """What o_proj is given for one row."""
        caught: list[Tensor] = []
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=self.model.rotary_emb(hidden, position_ids=positions),
                attention_mask=create_causal_mask(
                    config=self.model.config,
                    inputs_embeds=hidden,
                    attention_mask=None,
                    past_key_values=None,
                    position_ids=positions,
                ),
            )
        finally:
            hook.remove()
        return caught[0]

    def _neurons(self, layer: Any, middle: Tensor) -> Tensor:
        """What down_proj is given for one row."""
        normed = layer.post_attention_layernorm(middle)
        activated: Tensor = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        return activated


def gram(inputs: list[Tensor]) -> Tensor:
    """XᵀX in float64 of inputs [1, length, d] each."""
    total = torch.zeros(inputs[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64)
    for part in inputs:
        flat = part.reshape(-1, part.shape[-1])
        total += flat.T @ flat
    return total
