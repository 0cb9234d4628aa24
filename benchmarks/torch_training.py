"""IXC2.5 training in PyTorch eager, the other side of `train_against_torch.py`: autograd over the public arithmetic."""
from __future__ import annotations

import torch
from torch.nn import functional as F

from mindformers_ixc.processing.image import pixel_scale

VISION = "vit.vision_tower.vision_model."


class TorchTrainer:
    """Loss and AdamW steps over the parameters of a model of this package, float32 on CPU.

    Args:
        parameters: float32 arrays by public name.
        config: `IXC25Config` of the same model; its dropout must be 0.
        betas: of AdamW.
        eps: of AdamW.
        max_grad_norm: of the clipping.
    """

    def __init__(self, parameters, config, betas=(0.9, 0.95), eps: float = 1e-8, max_grad_norm: float = 1.0):
        self.config, self.max_grad_norm = config, max_grad_norm
        self.p = {name: torch.tensor(array, requires_grad=".lora_" not in name and "post_layernorm" not in name)
                  for name, array in parameters.items()}
        self.trained = [value for value in self.p.values() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, betas=betas, eps=eps, weight_decay=0.0)

    def step(self, batch: dict, rate: float) -> float:
        """One step; returns the loss before it."""
        loss = self.loss(**{name: torch.from_numpy(value) for name, value in batch.items()})
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.item()

    def loss(self, input_ids, labels, pixel_values, global_views, view_index, vision_index, image_mask):
        """Mean cross entropy over labelled positions of a batch (`mindformers_ixc.data.batch`)."""
        b, length = input_ids.shape
        tokens = F.embedding(input_ids.long(), self.p["model.tok_embeddings.weight"], self.config.pad_token_id)
        table = self.vision_table(self.tiles(pixel_values, global_views, view_index.long()))  # (B, rows, D)
        images = table.gather(1, vision_index.long()[..., None].expand(-1, -1, table.shape[-1]))
        mask = image_mask.bool()[..., None]                                                   # (B, L, 1)
        x = torch.where(mask, images, tokens)
        angles = self.angles(length)
        for i in range(self.config.num_hidden_layers):
            x = self.layer(x, mask, angles, f"model.layers.{i}.")
        logits = F.linear(self.rms(x, "model.norm.weight"), self.p["output.weight"])
        return F.cross_entropy(logits.view(b * length, -1), labels.long().view(-1), ignore_index=-100)

    @staticmethod
    def tiles(pixel_values, global_views, view_index):
        """Normalised tiles `(B, T, 3, P, P)`, from bytes and global views."""
        scale, shift = (torch.from_numpy(value)[:, None, None] for value in pixel_scale())
        local = pixel_values.float() * scale + shift
        index = (view_index - 1).clamp(0)[:, :, None, None, None].expand_as(local)
        return torch.where((view_index > 0)[:, :, None, None, None], global_views.gather(1, index), local)

    def vision_table(self, pixels):
        """Projected rows of every tile, then the two separators, `(B, T * n + 2, D)`."""
        vision, (b, t) = self.config.vision_config, pixels.shape[:2]
        kernel = self.p[VISION + "embeddings.patch_embedding.weight"]
        x = F.conv2d(pixels.flatten(0, 1), kernel, stride=vision.patch_size).flatten(2).transpose(1, 2)
        first = self.p[VISION + "embeddings.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat((first, x), 1) + self.p[VISION + "embeddings.position_embedding.weight"]
        x = self.norm(x, VISION + "pre_layrnorm")
        for i in range(vision.num_hidden_layers):
            x = self.vision_layer(x, f"{VISION}encoder.layers.{i}.")
        side = vision.tokens_per_side
        x = x[:, 1:].view(b, t, side, 2, side, 2, -1).transpose(3, 4).reshape(b, t * side * side, -1)
        ends = [self.p[name].view(1, 1, -1).expand(b, -1, -1) for name in ("plora_sub_GN", "plora_glb_GN")]
        return self.linear(F.gelu(self.linear(torch.cat((x, *ends), 1), "vision_proj.0")), "vision_proj.2")

    def vision_layer(self, x, name):
        """One CLIP layer."""
        heads = self.config.vision_config.num_attention_heads
        y = self.norm(x, name + "layer_norm1")
        q, k, v = (self.linear(y, f"{name}self_attn.{part}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.linear(y, name + "self_attn.out_proj")
        y = self.linear(self.norm(x, name + "layer_norm2"), name + "mlp.fc1")
        return x + self.linear(y * torch.sigmoid(1.702 * y), name + "mlp.fc2")

    def layer(self, x, mask, angles, name):
        """One decoder layer."""
        c, (b, length, _) = self.config, x.shape
        kv, groups, size = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_size
        y = self.plora(self.rms(x, name + "attention_norm.weight"), mask, name + "attention.wqkv")
        y = y.view(b, length, kv, groups + 2, size)
        q = self.rotate(y[..., :groups, :].reshape(b, length, kv * groups, size).transpose(1, 2), angles)
        k = self.rotate(y[..., groups, :].transpose(1, 2), angles)
        k, v = (side.repeat_interleave(groups, 1) for side in (k, y[..., groups + 1, :].transpose(1, 2)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, length, -1)
        x = x + self.plora(y, mask, name + "attention.wo")
        y = self.rms(x, name + "ffn_norm.weight")
        w1, w3 = (self.plora(y, mask, f"{name}feed_forward.{part}") for part in ("w1", "w3"))
        return x + self.plora(F.silu(w1) * w3, mask, name + "feed_forward.w2")

    def plora(self, x, mask, name):
        """A linear with Partial LoRA on the image positions."""
        side = F.linear(F.linear(x, self.p[name + ".Plora_A.weight"]), self.p[name + ".Plora_B.weight"])
        return F.linear(x, self.p[name + ".weight"]) + torch.where(mask, side * self.config.plora_scale, 0.0)

    def angles(self, length):
        """Cosines and sines `(L, d)`; lengths up to the trained one, where dynamic NTK does nothing."""
        size = self.config.head_size
        frequencies = self.config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * torch.cat((frequencies, frequencies))
        return angles.cos(), angles.sin()

    @staticmethod
    def rotate(x, angles):
        """Rotary embedding, halves convention."""
        low, high = x.chunk(2, -1)
        return x * angles[0] + torch.cat((-high, low), -1) * angles[1]

    def rms(self, x, name):
        """RMSNorm."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * self.p[name]

    def norm(self, x, name):
        """LayerNorm."""
        return F.layer_norm(x, x.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"],
                            self.config.vision_config.layer_norm_eps)

    def linear(self, x, name):
        """A linear with bias."""
        return F.linear(x, self.p[name + ".weight"], self.p[name + ".bias"])
