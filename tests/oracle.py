"""The slow way, which cannot go wrong: keys cached unrotated, all rotated at each pass.

This is how the published code decodes. Nothing of the project's rotation, caches or
planning is used, only the frequencies and gains of a scaling.
"""

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask


def turn(x, inv_freq, start=0):
    """Rotate (B, H, L, head_dim) from position `start`, halves against each other."""
    half = inv_freq.shape[-1]
    positions = mx.arange(start, start + x.shape[2]).astype(mx.float32)
    angles = positions[:, None] * inv_freq[..., None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return mx.concatenate(
        [
            first * mx.cos(angles) - second * mx.sin(angles),
            second * mx.cos(angles) + first * mx.sin(angles),
            rest,
        ],
        axis=-1,
    )


class Oracle:
    """One sequence through the weights of a scaled tiny LLaMA."""

    def __init__(self, model, expected_length=0):
        self.model = model
        self.expected_length = expected_length
        self.keys = [None] * len(model.layers)
        self.values = [None] * len(model.layers)
        self.length = 0

    def trim(self, tokens):
        """Forget the last tokens."""
        self.length -= tokens
        self.keys = [keys[:, :, : self.length] for keys in self.keys]
        self.values = [values[:, :, : self.length] for values in self.values]

    def __call__(self, ids):
        """Logits (1, L, V) of new token ids (1, L)."""
        start, count = self.length, ids.shape[1]
        self.length += count
        planned = max(self.length, self.expected_length)
        scaling, fixed = self.model.scaling, self.model.fixed_scale
        scale = scaling.scale_at(planned) if fixed is None else fixed
        planned = planned if fixed is None else round(fixed * scaling.trained_length)
        gain = scaling.query_gain(mx.arange(start, self.length), planned, scale)
        gain = 1.0 if gain is None else gain
        gain = gain[:, None] if isinstance(gain, mx.array) else gain

        h = self.model.model.embed_tokens(ids)
        mask = create_causal_mask(count, start)
        for index, layer in enumerate(self.model.layers):
            attention = layer.self_attn
            inv_freq = scaling.inv_freq(scale, index)
            x = layer.input_layernorm(h)
            q, k, v = (
                projection(x).reshape(1, count, -1, attention.head_dim).transpose(0, 2, 1, 3)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if self.keys[index] is not None:
                k = mx.concatenate([self.keys[index], k], axis=2)
                v = mx.concatenate([self.values[index], v], axis=2)
            self.keys[index], self.values[index] = k, v
            rotary_gain = scaling.rotary_gain(scale)
            q = turn(q, inv_freq, start) * rotary_gain * gain
            k = turn(k, inv_freq) * rotary_gain
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=attention.scale, mask=mask)
            h = h + attention.o_proj(out.transpose(0, 2, 1, 3).reshape(1, count, -1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.model.lm_head(self.model.model.norm(h))
