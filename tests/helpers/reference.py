"""An independent IXC2.5 in numpy: what the tests compare the MindSpore model and the search with.

Plain formulas in float64, one function a formula, no cache, no fused step and nothing shared with the package, so that
an error in either side shows. It reads the public file layout (`config.json`, `model.safetensors`) and is fast enough
only for models of a few layers.
"""
from __future__ import annotations

import json
from math import erf, sqrt
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"

# Task LoRA pairs in use in each mode of the public model (`infer_mode`).
TASK_LORAS = {"base": (), "write": ("sft", "dpo"), "web": ("web",)}

# Epsilon of CLIP's LayerNorm; the public config.json does not carry it.
LAYER_NORM_EPS = 1e-5


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities of the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function."""
    return 1.0 / (1.0 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """Exact GELU, by the error function."""
    return 0.5 * x * (1.0 + np.vectorize(erf)(x / sqrt(2.0)))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """LayerNorm of the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + LAYER_NORM_EPS) * weight + bias


def bicubic_weights(size: int, target: int) -> np.ndarray:
    """Matrix `(target, size)` of a bicubic resize: a = -0.75, corners not aligned, edges clamped, no antialias."""
    a, matrix = -0.75, np.zeros((target, size))
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - tap)
            near = (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1
            far = a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a
            matrix[row, min(max(tap, 0), size - 1)] += near if d <= 1 else far
    return matrix


def rotary_angles(config: dict, length: int) -> np.ndarray:
    """Angles `(length, d / 2)`: the trained base up to `max_position_embeddings`, the dynamic NTK base beyond."""
    d, base, trained = config["hidden_size"] // config["num_attention_heads"], config["rope_theta"], \
        config["max_position_embeddings"]
    if length > trained:
        factor = config["rope_scaling"]["factor"]
        base *= (factor * length / trained - (factor - 1)) ** (d / (d - 2))
    return np.arange(length)[:, None] / base ** (np.arange(0, d, 2) / d)


def cached_angles(config: dict, prompt: int, length: int) -> np.ndarray:
    """Angles `(length, d / 2)` of a prompt and of positions added to it one by one, with a key/value cache.

    The prompt's turn by its own length's base, each further one by the base of the length it makes; none is turned
    again.
    """
    steps = [rotary_angles(config, total)[-1:] for total in range(prompt + 1, length + 1)]
    return np.concatenate([rotary_angles(config, prompt), *steps])


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Turns `(B, L, n, d)` by angles `(L, d / 2)`: element i pairs with element i + d / 2."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class ReferenceModel:
    """The whole model, read from a directory in the public layout.

    Args:
        folder: holds `config.json` and `model.safetensors`.
    """

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: value.astype(np.float64)
                        for name, value in load_file(folder / "model.safetensors").items()}

    # The vision tower, the merge and the projector

    def vit_features(self, tiles: np.ndarray) -> np.ndarray:
        """Patch features `(N, patches, C)` of normalised tiles `(N, 3, S, S)`: last layer, class token dropped."""
        size, prefix = self.config["vision_config"], "vit.vision_tower.vision_model."
        n, p, width = len(tiles), size["patch_size"], size["hidden_size"]
        g = size["image_size"] // p
        kernel = self.weights[prefix + "embeddings.patch_embedding.weight"].reshape(width, -1)       # (C, 3*p*p)
        patches = tiles.reshape(n, 3, g, p, g, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, g * g, -1)
        first = np.broadcast_to(self.weights[prefix + "embeddings.class_embedding"], (n, 1, width))
        x = np.concatenate([first, patches @ kernel.T], axis=1)                                      # (N, 1+g*g, C)
        x = x + self.weights[prefix + "embeddings.position_embedding.weight"]
        x = self._vit_norm(x, prefix + "pre_layrnorm")
        for i in range(size["num_hidden_layers"]):
            layer = f"{prefix}encoder.layers.{i}."
            x = x + self._vit_attention(self._vit_norm(x, layer + "layer_norm1"), layer + "self_attn.")
            y = self._affine(self._vit_norm(x, layer + "layer_norm2"), layer + "mlp.fc1")
            x = x + self._affine(y * sigmoid(1.702 * y), layer + "mlp.fc2")
        return x[:, 1:]

    def merged_rows(self, image: np.ndarray) -> np.ndarray:
        """Rows `(tokens, 4C)` of a normalised picture `(3, h*S, w*S)`: global view, glb_GN, local view; before the
        projector.
        """
        side = self.config["vision_config"]["image_size"]
        h, w = image.shape[1] // side, image.shape[2] // side
        resize_rows, resize_columns = (bicubic_weights(size, side) for size in image.shape[1:])
        whole = self._merge(self.vit_features((resize_rows @ image @ resize_columns.T)[None]))       # (1, g, g, 4C)
        tiles = image.reshape(3, h, side, w, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
        local = self._merge(self.vit_features(tiles))                                                # (h*w, g, g, 4C)
        g, merged = local.shape[1], local.shape[3]
        local = local.reshape(h, w, g, g, merged).transpose(0, 2, 1, 3, 4).reshape(h * g, w * g, merged)
        separator = self.weights["plora_glb_GN"].reshape(1, merged)
        return np.concatenate([self._end_rows(whole[0]), separator, self._end_rows(local)])

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Image embeddings `(tokens, D)` of merged rows `(tokens, 4C)`."""
        return self._affine(gelu(self._affine(rows, "vision_proj.0")), "vision_proj.2")

    def _merge(self, features: np.ndarray) -> np.ndarray:
        n, patches, width = features.shape
        g = int(sqrt(patches)) // 2
        blocks = features.reshape(n, g, 2, g, 2, width).transpose(0, 1, 3, 2, 4, 5)                 # (N, g, g, 2, 2, C)
        return blocks.reshape(n, g, g, 4 * width)

    def _end_rows(self, grid: np.ndarray) -> np.ndarray:
        end = np.broadcast_to(self.weights["plora_sub_GN"].reshape(1, 1, -1), (len(grid), 1, grid.shape[-1]))
        return np.concatenate([grid, end], axis=1).reshape(-1, grid.shape[-1])

    def _affine(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _vit_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _vit_attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        n, length, width = x.shape
        heads = self.config["vision_config"]["num_attention_heads"]
        q, k, v = (self._affine(x, f"{prefix}{part}_proj").reshape(n, length, heads, -1).transpose(0, 2, 1, 3)
                   for part in "qkv")                                                                # (N, H, L, d)
        y = softmax(q @ k.transpose(0, 1, 3, 2) / sqrt(width // heads)) @ v
        return self._affine(y.transpose(0, 2, 1, 3).reshape(n, length, width), f"{prefix}out_proj")

    # The language model

    def embed(self, ids: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
        """Embeddings `(L, D)` of ids `(L,)`; -1 marks the positions of the picture `(3, H, W)`, in order."""
        x = self.weights["model.tok_embeddings.weight"][np.maximum(ids, 0)]
        if image is not None:
            x[ids < 0] = self.project(self.merged_rows(image))
        return x

    def logits(self, embeds: np.ndarray, image_mask: np.ndarray, mode: str = "base",
               angles: np.ndarray | None = None) -> np.ndarray:
        """Logits `(B, L, V)`.

        Args:
            embeds: `(B, L, D)`; shorter sequences are padded on the right with anything.
            image_mask: bool `(B, L)`, the positions Partial LoRA acts on.
            mode: task LoRAs in use, a key of `TASK_LORAS`.
            angles: of the positions, `(L, d / 2)`; by default those of a sequence without a cache.
        """
        angles = rotary_angles(self.config, embeds.shape[1]) if angles is None else angles
        image, x = image_mask[..., None], embeds
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            x = x + self._attention(self._rms_norm(x, layer + "attention_norm"), angles, image, mode,
                                    layer + "attention.")
            y = self._rms_norm(x, layer + "ffn_norm")
            gate = self._linear(y, image, mode, layer + "feed_forward.w1")
            y = gate * sigmoid(gate) * self._linear(y, image, mode, layer + "feed_forward.w3")
            x = x + self._linear(y, image, mode, layer + "feed_forward.w2")
        return self._rms_norm(x, "model.norm") @ self.weights["output.weight"].T

    def _rms_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x ** 2).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def _linear(self, x: np.ndarray, image: np.ndarray, mode: str, name: str) -> np.ndarray:
        def product(inputs: np.ndarray, part: str) -> np.ndarray:
            return inputs @ self.weights[f"{name}{part}.weight"].T

        scale = self.config["plora_alpha"] / self.config["plora_rank"]
        y = product(x, "") + image * scale * product(product(x, ".Plora_A"), ".Plora_B")
        for task in TASK_LORAS[mode]:
            y = y + product(product(x, f".lora_{task}_A"), f".lora_{task}_B")
        return y

    def _attention(self, x: np.ndarray, angles: np.ndarray, image: np.ndarray, mode: str, prefix: str) -> np.ndarray:
        b, length, width = x.shape
        heads, kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        groups, d = heads // kv, width // heads
        # rows of wqkv: for each key/value head its query heads, its key head, its value head
        qkv = self._linear(x, image, mode, prefix + "wqkv").reshape(b, length, kv, groups + 2, d)
        query = rotate(qkv[..., :groups, :].reshape(b, length, heads, d), angles).transpose(0, 2, 1, 3)  # (B, H, L, d)
        key = rotate(qkv[..., groups, :], angles).repeat(groups, axis=2).transpose(0, 2, 1, 3)           # (B, H, L, d)
        value = qkv[..., groups + 1, :].repeat(groups, axis=2).transpose(0, 2, 1, 3)                     # (B, H, L, d)
        scores = query @ key.transpose(0, 1, 3, 2) / sqrt(d)                                             # (B, H, L, L)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        y = (softmax(scores) @ value).transpose(0, 2, 1, 3).reshape(b, length, width)
        return self._linear(y, image, mode, prefix + "wo")


class ReferenceDecoder:
    """Decoder protocol of `mindformers_ixc.generation.search` over the reference model, without a cache.

    Args:
        model: the reference model.
        prompts: `(ids (L,), picture (3, H, W) or None)` of each prompt, -1 at image positions.
        mode: task LoRAs in use.
        beams: rows a prompt, side by side.
    """

    def __init__(self, model: ReferenceModel, prompts: list[tuple[np.ndarray, np.ndarray | None]], mode: str = "base",
                 beams: int = 1):
        self.model, self.mode = model, mode
        embedded = [model.embed(ids, image) for ids, image in prompts]
        self.rows = [embedded[i // beams] for i in range(len(prompts) * beams)]
        self.masks = [prompts[i // beams][0] < 0 for i in range(len(prompts) * beams)]

    def prefill(self) -> np.ndarray:
        """float32 logits `(B, V)` after each row."""
        length = max(len(row) for row in self.rows)
        embeds = np.zeros((len(self.rows), length, self.rows[0].shape[-1]))
        image_mask = np.zeros(embeds.shape[:2], bool)
        for i, (row, mask) in enumerate(zip(self.rows, self.masks)):
            embeds[i, :len(row)], image_mask[i, :len(mask)] = row, mask
        logits = self.model.logits(embeds, image_mask, self.mode)
        return np.stack([logits[i, len(row) - 1] for i, row in enumerate(self.rows)]).astype(np.float32)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """float32 logits `(B, V)` after appending one id to each row."""
        new = self.model.embed(np.asarray(tokens))
        self.rows = [np.concatenate([row, vector[None]]) for row, vector in zip(self.rows, new)]
        return self.prefill()

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row i continue what row `rows[i]` held."""
        self.rows = [self.rows[i] for i in rows]
        self.masks = [self.masks[i] for i in rows]
