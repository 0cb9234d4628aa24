"""Checks of the device code against reference outputs of the public model: features, logits, loss, gradients, decoding.

Each check takes a folder laid out like `t1` or `t2` (config.json, model.safetensors, *.npz) and returns rows
`(check, cases, largest error, bar, passed)`. Everything is loaded through the package's own loading path.
"""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from parity_rows import Row, output, row

from mindformers_ixc.config import read_config
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.models.rotary import rotary_tables
from mindformers_ixc.processing.image import Grid, Tiles, bicubic_resize, image_to_tiles, image_token_rows, normalise
from mindformers_ixc.processing.processor import EncodedSample
from mindformers_ixc.processing.prompt import shift_labels

MODES = tuple(MODE_ADAPTERS)

# Parameters the recipe trains but for which this layout holds no gradient; the wide layout has them (parity_wide).
WITHOUT_REFERENCE = ("Plora_A", "Plora_B", "plora_glb_GN", "plora_sub_GN")


def tiles_of(pixels: np.ndarray, side: int) -> tuple[np.ndarray, Grid]:
    """Global view and local tiles `(1 + h*w, 3, S, S)` of a normalised image `(3, h*S, w*S)`."""
    grid = Grid(pixels.shape[1] // side, pixels.shape[2] // side)
    local = pixels.reshape(3, grid.rows, side, grid.columns, side).transpose(1, 3, 0, 2, 4)
    tiles = np.concatenate([bicubic_resize(pixels, side)[None], local.reshape(-1, 3, side, side)])
    return tiles.astype(np.float32), grid


def sample_of(ids: np.ndarray, images, config) -> EncodedSample:
    """A prompt from reference ids (below 0 at image positions) and its normalised images `(3, H, W)`, one or a list."""
    side = config.vision_config.image_size
    cut = [tiles_of(image, side) for image in ([images] if isinstance(images, np.ndarray) else images)]
    mask = (ids < 0).astype(np.int32)
    ids = np.where(ids < 0, config.pad_token_id, ids).astype(np.int32)
    tiles = Tiles.of_normalised(np.concatenate([Tiles.none(side).views, *(pixels for pixels, _ in cut)]))
    return EncodedSample(input_ids=ids, labels=np.full_like(ids, -100), image_mask=mask,
                         grids=[grid for _, grid in cut], pictures=tiles,
                         tokens_per_side=config.vision_config.tokens_per_side)


def check_vision(folder: Path) -> list[Row]:
    """ViT features, merged rows, projector output and token counts of a folder's `vision.npz`."""
    reference = np.load(folder / "vision.npz")
    model = load_model(folder)
    tiles = reference["vit_tiles"] if "vit_tiles" in reference.files else normalise(reference["vit_tile_u8"])[None]
    features = model.vit(Tensor(tiles)).asnumpy()
    rows = [row(f"{folder.name}: ViT features", [np.abs(features - output(reference, "vit_features")).max()], 2e-5)]
    side, tokens_side = model.config.vision_config.image_size, model.config.vision_config.tokens_per_side
    merged, embedded, counts = [], [], []
    merge, project = Method(model, "merged_rows"), Method(model, "vision_table")
    for key in (k for k in reference.files if k.endswith("_image_u8")):
        name = key[:-len("_image_u8")]
        tiles = image_to_tiles(reference[key], side)
        grid = Grid(reference[key].shape[0] // side, reference[key].shape[1] // side)
        index = image_token_rows(grid, 0, tokens_side, len(tiles))
        pixels = Tensor(tiles[None])
        merged.append(np.abs(merge(pixels).asnumpy()[0][index] - output(reference, f"{name}_rows")).max())
        embedded.append(np.abs(project(pixels).asnumpy()[0][index] - output(reference, f"{name}_embeds")).max())
        counts.append(abs(len(index) - int(reference[f"{name}_tokens"].reshape(-1)[0])))
    rows.append(row(f"{folder.name}: merge rows", merged, 2e-5))
    rows.append(row(f"{folder.name}: projector output", embedded, 2e-5))
    rows.append(row(f"{folder.name}: image token counts", counts, 0))
    return rows


class Method(nn.Cell):
    """One method of the model as a graph of its own."""

    def __init__(self, model, method: str):
        super().__init__(auto_prefix=False)
        self.model = model
        self.merged = method == "merged_rows"

    def construct(self, pixels):
        """Rows of the vision table, before or after the projector."""
        if self.merged:
            return self.model.merged_rows(pixels)
        return self.model.vision_table(pixels)


class LogitsOfEmbeddings(nn.Cell):
    """Logits of given embeddings: the language model alone."""

    def __init__(self, model, mode: str):
        super().__init__(auto_prefix=False)
        self.model, self.adapters = model, MODE_ADAPTERS[mode]

    def construct(self, embeds, image_mask, cos, sin):
        """Maps `(B, L, D)` and `(B*L, 1)` to `(B, L, V)`."""
        b, length, width = embeds.shape
        x = self.model.model(F.reshape(embeds, (b * length, width)), image_mask, cos, sin, self.adapters, (b, length))
        return F.reshape(self.model.output(x), (b, length, -1))


def logits_of(model, mode: str, embeds: np.ndarray, image_mask: np.ndarray,
              ntk_length: int | None = None) -> np.ndarray:
    """Logits `(B, L, V)` of embeddings `(B, L, D)` with image positions `(B, L)`; see `rotary_tables` for the last."""
    tables = rotary_tables(model.config, embeds.shape[1], ntk_length)
    cos, sin = (Tensor(table[None, :, None, None, :]) for table in tables)
    mask = Tensor(image_mask.reshape(-1, 1).astype(np.float32)).astype(model.config.compute_dtype)
    x = Tensor(embeds).astype(model.config.compute_dtype)
    return LogitsOfEmbeddings(model, mode)(x, mask, cos, sin).asnumpy().astype(np.float32)


def check_logits(folder: Path) -> list[Row]:
    """Logits in each mode, of a right-padded batch and beyond the trained length."""
    reference = np.load(folder / "llm.npz")
    model = load_model(folder)
    rows = []
    for mode in MODES:
        mask = reference[f"{mode}_ids"] < 0
        logits = logits_of(model, mode, reference[f"{mode}_embeds"][None], mask[None])[0]
        whole = whole_model_logits(folder, reference[f"{mode}_ids"], reference[f"{mode}_image"][0], mode)
        errors = [np.abs(logits - reference[f"{mode}_logits"]).max(), np.abs(whole - reference[f"{mode}_logits"]).max()]
        rows.append(row(f"{folder.name}: logits, mode {mode}", errors, 1e-4))
    real = reference["pad_attention_mask"] == 1
    logits = logits_of(model, "base", reference["pad_embeds"], reference["pad_image_mask"])
    rows.append(row(f"{folder.name}: logits, right-padded batch",
                    [np.abs(a[r] - b[r]).max() for a, b, r in zip(logits, reference["pad_logits"], real)], 1e-4))
    logits = logits_of(model, "base", reference["ntk_embeds"][None], reference["ntk_image_mask"][None])[0]
    error = np.abs(logits[-32:] - reference["ntk_logits_last32"]).max()
    rows.append(row(f"{folder.name}: logits, dynamic NTK", [error], 1e-4))
    return rows


def whole_model_logits(folder: Path, ids: np.ndarray, image: np.ndarray, mode: str) -> np.ndarray:
    """Logits `(L, V)` from ids and pixels `(3, H, W)`, through the model's own `construct`."""
    tiles = 1 + tiles_of(image, read_config(folder).vision_config.image_size)[1].tiles
    model = load_model(folder, IXC25ForCausalLM, seq_length=len(ids), max_tiles=tiles, adapter_mode=mode)
    batch = sample_of(ids, image, model.config).pad(len(ids), tiles, tiles, model.config.pad_token_id)
    columns = [None if name == "labels" else Tensor(batch[name][None]) for name in BATCH_COLUMNS]
    return model(*columns).asnumpy()[0]


def training_batch(folder: Path, **overrides):
    """Model and input tensors of `train.npz`, Partial LoRA dropout off."""
    reference = np.load(folder / "train.npz")
    length = reference["ids"].shape[1]
    side = read_config(folder).vision_config.image_size
    count = max(1 + tiles_of(reference[f"image_{i}"][0], side)[1].tiles for i in range(len(reference["ids"])))
    model = load_model(folder, seq_length=length, max_tiles=count, plora_dropout=0.0, **overrides)
    columns = []
    for i, ids in enumerate(reference["ids"]):
        batch = sample_of(ids, reference[f"image_{i}"][0], model.config).pad(length, count, count,
                                                                                  model.config.pad_token_id)
        labels = np.where(reference["attention_mask"][i] == 1, reference["labels"][i], -100).astype(np.int32)
        columns.append({**batch, "labels": shift_labels(labels)})
    return reference, model, [Tensor(np.stack([row[name] for row in columns])) for name in BATCH_COLUMNS]


def check_training(folder: Path) -> list[Row]:
    """Training loss and the gradient of every parameter."""
    reference, model, batch = training_batch(folder)
    parameters = model.trainable_params()
    loss, gradients = ms.value_and_grad(model, None, parameters)(*batch)
    loss = float(loss.asnumpy().reshape(-1)[0])
    expected = float(reference["loss"])
    ours = {parameter.name: gradient.asnumpy() for parameter, gradient in zip(parameters, gradients)}
    theirs = {key[5:]: reference[key] for key in reference.files if key.startswith("grad/")}
    errors = [gradient_error(ours[name], theirs[name], theirs) for name in theirs.keys() & ours.keys()]
    extra = [name for name in ours if name not in theirs and not any(part in name for part in WITHOUT_REFERENCE)]
    return [row(f"{folder.name}: training loss (relative)", [abs(loss - expected) / abs(expected)], 1e-6),
            row(f"{folder.name}: gradients (relative)", errors, 1e-4),
            row(f"{folder.name}: gradients missing or extra", [len(theirs.keys() - ours.keys()), len(extra)], 0)]


def gradient_error(ours: np.ndarray, theirs: np.ndarray, all_theirs: dict[str, np.ndarray]) -> float:
    """Largest difference, relative to the reference gradient's own largest element.

    A key bias shifts all scores of a query alike, so its gradient is zero in exact arithmetic; the reference, made in
    float64, holds rounding (1e-17) there. Such a gradient must be zero to float32's resolution of the largest gradient;
    reaching that resolution counts as reaching the bar of 1e-4.
    """
    resolution = max(np.abs(gradient).max() for gradient in all_theirs.values()) * np.finfo(np.float32).eps
    if np.abs(theirs).max() < resolution:
        return float(1e-4 * np.abs(ours).max() / resolution)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


GENERATION_CASES = {
    "greedy": {},
    "greedy_rep": {"repetition_penalty": 1.3},
    "beam3": {"num_beams": 3, "repetition_penalty": 1.005},
    "beam3_lp": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beam4": {"num_beams": 4},
}


def check_generation(folder: Path) -> list[Row]:
    """Generated ids in each mode; the error is the number of ids that differ."""
    reference = np.load(folder / "generate.npz")
    assistant = Assistant(load_model(folder), None)
    # the reference stops at </s> and at the last id of its small vocabulary
    stops = (assistant.model.config.eos_token_id, assistant.model.config.vocab_size - 1)
    rows = []
    for case, options in GENERATION_CASES.items():
        options = GenerationOptions(max_new_tokens=24, stop_token_ids=stops, **options)
        errors = []
        for mode in MODES:
            sample = sample_of(reference[f"{mode}_ids"], reference[f"{mode}_image"][0], assistant.model.config)
            ids = list(assistant.generate([sample], options, mode)[0])
            expected = reference[f"{mode}_{case}"].tolist()
            errors.append(sum(a != b for a, b in zip(ids, expected)) + abs(len(ids) - len(expected)))
        rows.append(row(f"{folder.name}: generate, {case}", errors, 0))
    return rows


def check_dpo(folder: Path) -> list[Row]:
    """Summed log-probabilities, implicit rewards and the sigmoid DPO loss."""
    reference = np.load(folder / "dpo.npz")
    model, beta = load_model(folder), float(reference["beta"])
    ours = {}
    for role, mode in (("policy", "write"), ("reference", "base")):
        for answer in ("chosen", "rejected"):
            ours[f"{role}_{answer}"] = answer_log_probability(model, mode, reference["prompt"], reference[answer])
    for answer in ("chosen", "rejected"):
        ours[f"reward_{answer}"] = beta * (ours[f"policy_{answer}"] - ours[f"reference_{answer}"])
    margin = ours["reward_chosen"] - ours["reward_rejected"]
    loss = float(np.log1p(np.exp(-margin)).mean())
    rows = [row(f"{folder.name}: DPO {name}", [np.abs(value - reference[name]).max()], 1e-4)
            for name, value in ours.items()]
    return [*rows, row(f"{folder.name}: DPO loss", [abs(loss - float(reference["loss"]))], 1e-4)]


def answer_log_probability(model, mode: str, prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Summed log-probability of each text answer `(B, A)` after its prompt `(B, P)`."""
    ids = np.concatenate([prompts, answers], axis=1).astype(np.int32)
    embeds = model.model.tok_embeddings(Tensor(ids)).asnumpy()
    logits = logits_of(model, mode, embeds, np.zeros(ids.shape)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    start = prompts.shape[1]
    picked = np.take_along_axis(log_probabilities[:, start - 1:-1], answers[..., None].astype(np.int64), -1)
    return picked[..., 0].sum(-1)


def check_float16(folder: Path) -> list[Row]:
    """float16 products against float32: relative error of the logits and agreement of the likeliest token."""
    reference = np.load(folder / "llm.npz")
    errors, agreement, positions = [], 0, 0
    for mode in MODES:
        mask = reference[f"{mode}_ids"] < 0
        half = logits_of(load_model(folder, compute_dtype="float16"), mode, reference[f"{mode}_embeds"][None],
                         mask[None])
        full = reference[f"{mode}_logits"]
        errors.append(np.abs(half[0] - full).max() / np.abs(full).max())
        agreement += int((half[0].argmax(-1) == full.argmax(-1)).sum())
        positions += len(full)
    return [row(f"{folder.name}: float16 logits (relative)", errors, 2e-2),
            row(f"{folder.name}: float16 argmax disagreement", [1 - agreement / positions], 0.02)]


# The checks that need these files, all of them in the folder; `check_vision` is that of both layouts.
CHECKS = {("llm.npz",): [check_logits, check_float16], ("train.npz",): [check_training],
          ("generate.npz",): [check_generation], ("dpo.npz",): [check_dpo]}
