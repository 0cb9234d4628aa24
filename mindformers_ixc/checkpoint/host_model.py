"""The network on the host, in NumPy, a layer at a time: what goes into each linear, for calibration.

The weights of one layer are in memory at once, in float32, and the states of all samples; nothing is compiled and
MindSpore is not needed. Letters of shapes are those of `mindformers_ixc.models`.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from mindformers_ixc.checkpoint.dtypes import to_float32
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.parameters import VISION, linear_shapes
from mindformers_ixc.processing.encoded import EncodedSample

# Called with the path of a linear below its layer and the inputs `(N, F)` it gets.
Look = Callable[[str, np.ndarray], None]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis; overwrites the scores."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, without an overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def gelu(x: np.ndarray) -> np.ndarray:
    """Exact GELU, but for 2e-7: the error function by Abramowitz and Stegun's formula 7.1.26."""
    size = np.abs(x) / np.float32(math.sqrt(2))
    t = 1 / (1 + 0.3275911 * size)
    tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    erf = np.sign(x) * (1 - tail * np.exp(-size * size))
    return 0.5 * x * (1 + erf)


class HostModel:
    """The network over the tensors of a checkpoint.

    Args:
        tensors: of the whole model, by public name; they are read when they are needed.
        config: its configuration.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], config: ModelConfig):
        self.tensors, self.config = tensors, config

    def weight(self, name: str) -> np.ndarray:
        """A parameter in float32."""
        tensor = self.tensors[name]
        return to_float32(tensor.whole(), tensor.dtype)

    def embeddings(self, sample: EncodedSample) -> np.ndarray:
        """Embeddings `(L, D)` of a sample, pictures in place."""
        table = self.tensors["model.tok_embeddings.weight"]
        ids, places = np.unique(sample.input_ids, return_inverse=True)
        rows = np.stack([to_float32(table.rows(int(one), int(one) + 1), table.dtype)[0] for one in ids])
        x = rows[places.reshape(-1)]
        image = sample.image_mask == 1
        if image.any():
            x[image] = self.vision_table(sample.pixel_values)[sample.vision_index(sample.tiles)[image]]
        return x

    def vision_table(self, tiles: np.ndarray) -> np.ndarray:
        """The vision table `(T*k*k + 2, D)` of normalised tiles `(T, 3, P, P)`."""
        side, width = self.config.vision_config.tokens_per_side, self.config.vision_config.hidden_size
        blocks = self._tower(tiles).reshape(-1, side, 2, side, 2, width).transpose(0, 1, 3, 2, 4, 5)
        rows = np.concatenate([blocks.reshape(-1, 4 * width), self.weight("plora_sub_GN").reshape(1, -1),
                               self.weight("plora_glb_GN").reshape(1, -1)])
        return self._affine(gelu(self._affine(rows, "vision_proj.0")), "vision_proj.2")

    def _affine(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weight(f"{name}.weight").T + self.weight(f"{name}.bias")

    def _layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred * centred).mean(-1, keepdims=True) + self.config.vision_config.layer_norm_eps)
        return centred / scale * self.weight(f"{name}.weight") + self.weight(f"{name}.bias")

    def _tower(self, tiles: np.ndarray) -> np.ndarray:
        """Features `(T, g*g, C)` of the last layer, class token dropped."""
        vision = self.config.vision_config
        count, grid, patch, width = len(tiles), vision.patches_per_side, vision.patch_size, vision.hidden_size
        patches = tiles.reshape(count, 3, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
        kernel = self.weight(f"{VISION}.embeddings.patch_embedding.weight").reshape(width, -1)
        first = np.broadcast_to(self.weight(f"{VISION}.embeddings.class_embedding"), (count, 1, width))
        x = np.concatenate([first, patches.reshape(count, grid * grid, -1) @ kernel.T], 1)
        x = x + self.weight(f"{VISION}.embeddings.position_embedding.weight")
        x = self._layer_norm(x, f"{VISION}.pre_layrnorm")
        for number in range(vision.num_hidden_layers):
            layer = f"{VISION}.encoder.layers.{number}"
            x = x + self._tower_attention(self._layer_norm(x, f"{layer}.layer_norm1"), f"{layer}.self_attn")
            y = self._affine(self._layer_norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
            x = x + self._affine(y * sigmoid(1.702 * y), f"{layer}.mlp.fc2")
        return x[:, 1:]

    def _tower_attention(self, x: np.ndarray, name: str) -> np.ndarray:
        heads = self.config.vision_config.num_attention_heads
        count, length, width = x.shape
        q, k, v = (self._affine(x, f"{name}.{part}_proj").reshape(count, length, heads, -1) for part in "qkv")
        y = np.empty((count, length, heads, width // heads), np.float32)
        for tile in range(count):
            for head in range(heads):       # one head's scores are in memory at a time
                scores = q[tile, :, head] @ k[tile, :, head].T * np.float32((width // heads) ** -0.5)
                y[tile, :, head] = softmax(scores) @ v[tile, :, head]
        return self._affine(y.reshape(count, length, width), f"{name}.out_proj")

    def layer(self, number: int) -> HostLayer:
        """A decoder layer, its weights read."""
        return HostLayer(self, number)


class HostLayer:
    """A decoder layer in mode base, with weights of its own in memory, which may be replaced.

    Args:
        model: whose layer it is.
        number: which.
    """

    def __init__(self, model: HostModel, number: int):
        self.config, prefix = model.config, f"model.layers.{number}."
        self.weights = {path: model.weight(f"{prefix}{path}.weight") for path in linear_shapes(model.config)}
        self.pairs = {path: [model.weight(f"{prefix}{path}.Plora_{side}.weight") for side in "AB"]
                      for path in self.weights} if model.config.plora_rank else {}
        self.norms = {name: model.weight(f"{prefix}{name}.weight") for name in ("attention_norm", "ffn_norm")}

    def __call__(self, x: np.ndarray, image: np.ndarray, look: Look = lambda path, inputs: None) -> np.ndarray:
        """Maps the states of a sample `(L, D)` to the next layer's.

        Args:
            x: the states.
            image: bool `(L,)`, the positions of pictures.
            look: sees what goes into each linear.
        """
        y = self._norm(x, "attention_norm")
        look("attention.wqkv", y)
        y = self._attention(self._linear("attention.wqkv", y, image))
        look("attention.wo", y)
        x = x + self._linear("attention.wo", y, image)
        y = self._norm(x, "ffn_norm")
        look("feed_forward.w1", y)
        gate = self._linear("feed_forward.w1", y, image)
        y = gate * sigmoid(gate) * self._linear("feed_forward.w3", y, image)
        look("feed_forward.w2", y)
        return x + self._linear("feed_forward.w2", y, image)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.norms[name]

    def _linear(self, path: str, x: np.ndarray, image: np.ndarray) -> np.ndarray:
        y = x @ self.weights[path].T
        if path in self.pairs and image.any():
            first, second = self.pairs[path]
            y[image] += np.float32(self.config.plora_scale) * (x[image] @ first.T @ second.T)
        return y

    def _attention(self, qkv: np.ndarray) -> np.ndarray:
        """Causal attention `(L, H*d)` of the consolidated product `(L, KV * (G+2) * d)`."""
        config, length = self.config, len(qkv)
        kv, groups, size = config.num_key_value_heads, config.query_groups, config.head_size
        angles = np.arange(length)[:, None] / config.rope_theta ** (np.arange(0, size, 2) / size)
        cos, sin = np.cos(angles).astype(np.float32)[:, None], np.sin(angles).astype(np.float32)[:, None]
        heads = qkv.reshape(length, kv, groups + 2, size)
        hidden = np.triu(np.ones((length, length), bool), 1)
        y = np.empty((length, kv, groups, size), np.float32)
        for head in range(kv):
            turned = _rotated(heads[:, head, :groups + 1], cos, sin)
            for group in range(groups):
                scores = turned[:, group] @ turned[:, groups].T * np.float32(size ** -0.5)
                scores[hidden] = -np.inf
                y[:, head, group] = softmax(scores) @ heads[:, head, groups + 1]
        return y.reshape(length, -1)


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Vectors `(L, n, d)` turned by angles `(L, 1, d/2)`."""
    low, high = np.split(x, 2, -1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
