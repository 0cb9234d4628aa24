"""IXC2.5 inference in PyTorch eager, the other side of `decode.py`: same weights, same arithmetic, float32 on CPU.

Written the way PyTorch runs it best without compiling: fused attention (`scaled_dot_product_attention`), fused norms, a
preallocated key/value cache of which only the filled part is read, Partial LoRA on the image rows only.
"""
from __future__ import annotations

import torch
from torch.nn import functional as F


class TorchModel:
    """Vision table, prefill and decode over the parameters of a model of this package.

    Args:
        parameters: float32 arrays by public name.
        config: `IXC25Config` of the same model.
    """

    def __init__(self, parameters, config):
        self.p = {name: torch.from_numpy(array.copy()) for name, array in parameters.items()}
        self.config = config
        self.head = config.head_size

    def vision_tokens(self, pixels):
        """Projected image tokens of a picture whose first tile is the global view, `(n_image, D)`.

        Args:
            pixels: `(1 + h * w, 3, S, S)`.
        """
        vision = self.config.vision_config
        name = "vit.vision_tower.vision_model."
        kernel = self.p[name + "embeddings.patch_embedding.weight"]
        x = F.conv2d(pixels, kernel, stride=vision.patch_size).flatten(2).transpose(1, 2)     # (T, g*g, C)
        first = self.p[name + "embeddings.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat((first, x), 1) + self.p[name + "embeddings.position_embedding.weight"]
        x = self._norm(x, name + "pre_layrnorm")
        for i in range(vision.num_hidden_layers):
            x = self._vision_layer(x, f"{name}encoder.layers.{i}.")
        return self._project(x[:, 1:], vision)

    def _norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"],
                            self.config.vision_config.layer_norm_eps)

    def _linear(self, x, name):
        return F.linear(x, self.p[name + ".weight"], self.p[name + ".bias"])

    def _vision_layer(self, x, name):
        heads = self.config.vision_config.num_attention_heads
        y = self._norm(x, name + "layer_norm1")
        q, k, v = (self._linear(y, f"{name}self_attn.{part}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self._linear(y, name + "self_attn.out_proj")
        y = self._linear(self._norm(x, name + "layer_norm2"), name + "mlp.fc1")
        return x + self._linear(y * torch.sigmoid(1.702 * y), name + "mlp.fc2")

    def _project(self, x, vision):
        """Merges 2 x 2 patches, lays the tiles out on a 2 x 2 grid, adds the separators and projects."""
        side, width = vision.tokens_per_side, vision.hidden_size
        x = x.reshape(-1, side, 2, side, 2, width).transpose(2, 3).reshape(-1, side, side, 4 * width)
        local = x[1:].reshape(2, 2, side, side, -1).transpose(1, 2).reshape(2 * side, 2 * side, -1)
        sub, glb = self.p["plora_sub_GN"].reshape(1, 1, -1), self.p["plora_glb_GN"].reshape(1, -1)
        views = [torch.cat((view, sub.expand(len(view), 1, -1)), 1).flatten(0, 1) for view in (x[0], local)]
        rows = torch.cat((views[0], glb, views[1]))
        return self._linear(F.gelu(self._linear(rows, "vision_proj.0")), "vision_proj.2")

    def start(self, capacity, cos, sin):
        """Empties the cache and sets the rotary tables `(capacity, d)`."""
        config = self.config
        shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, capacity, self.head)
        self.cache, self.length = torch.empty(shape), 0
        self.cos, self.sin = torch.from_numpy(cos), torch.from_numpy(sin)

    def forward(self, ids, image_rows=None, image_mask=None):
        """Logits `(V,)` after appending ids `(L,)`; image positions take `image_rows` and Partial LoRA."""
        x = F.embedding(ids, self.p["model.tok_embeddings.weight"])[None]                     # (1, L, D)
        where = None if image_mask is None else image_mask[None]
        if where is not None:
            x[where] = image_rows
        place = slice(self.length, self.length + len(ids))
        cos, sin = self.cos[place], self.sin[place]
        for i in range(self.config.num_hidden_layers):
            x = self._layer(x, f"model.layers.{i}.", self.cache[i], place, cos, sin, where)
        self.length = place.stop
        x = F.rms_norm(x[0, -1], x.shape[-1:], self.p["model.norm.weight"], self.config.rms_norm_eps)
        return F.linear(x, self.p["output.weight"])

    def _plora(self, x, name, where):
        y = F.linear(x, self.p[name + ".weight"])
        if where is not None:
            side = F.linear(F.linear(x[where], self.p[name + ".Plora_A.weight"]), self.p[name + ".Plora_B.weight"])
            y[where] += side * self.config.plora_scale
        return y

    def _layer(self, x, name, cache, place, cos, sin, where):
        config, size = self.config, self.config.hidden_size
        y = F.rms_norm(x, (size,), self.p[name + "attention_norm.weight"], config.rms_norm_eps)
        qkv = self._plora(y, name + "attention.wqkv", where)
        qkv = qkv.unflatten(-1, (config.num_key_value_heads, config.query_groups + 2, self.head))
        q = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)                                    # (1, H, L, d)
        k, v = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)               # (1, KV, L, d)
        cache[0][:, :, place] = self._rotate(k, cos, sin)
        cache[1][:, :, place] = v
        keys, values = cache[0][:, :, :place.stop], cache[1][:, :, :place.stop]
        y = F.scaled_dot_product_attention(self._rotate(q, cos, sin), keys, values, is_causal=q.shape[2] > 1,
                                           enable_gqa=True)
        x = x + self._plora(y.transpose(1, 2).flatten(2), name + "attention.wo", where)
        y = F.rms_norm(x, (size,), self.p[name + "ffn_norm.weight"], config.rms_norm_eps)
        y = F.silu(self._plora(y, name + "feed_forward.w1", where)) * self._plora(y, name + "feed_forward.w3", where)
        return x + self._plora(y, name + "feed_forward.w2", where)

    @staticmethod
    def _rotate(x, cos, sin):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin
