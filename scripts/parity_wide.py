"""Checks of the device code against reference outputs of the wide layout.

The wide layout has outputs in both precisions (`_f32`, `_f64`) where `parity_device`'s has one, and more of them:
gradients of every parameter in three modes, losses of six AdamW steps, decoding with a cache beyond the trained length,
generated ids by settings, scores after each filter of sampling, DPO with its gradients.
"""
from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops import functional as F
from parity_device import MODES, gradient_error, logits_of, sample_of, whole_model_logits
from parity_rows import Row, output, row

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.sampling import apply_repetition_penalty, softmax, warp
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.processing.image import normalise
from mindformers_ixc.processing.prompt import shift_labels

# Settings of the reference's optimizer steps.
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def is_wide(folder: Path) -> bool:
    """Whether a model folder is in the wide layout."""
    if any((folder / name).is_file() for name in ("generate.json", "train_grads.npz")):
        return True
    return (folder / "vision.npz").is_file() and "vit_tile_u8" in np.load(folder / "vision.npz").files


def check_logits(folder: Path) -> list[Row]:
    """Logits of whole sequences from their embeddings; what the file does not hold is left out."""
    reference, model, rows = np.load(folder / "llm.npz"), load_model(folder), []
    for name, title in (("single", "one picture"), ("text", "text"), ("pad", "right-padded batch"),
                        ("ntk", "dynamic NTK"), ("single_after_long", "tables of a longer input")):
        inputs = name.removesuffix("_after_long")
        if f"{inputs}_embeds" not in reference.files:
            continue
        embeds = reference[f"{inputs}_embeds"]
        mask = reference[f"{inputs}_im_mask"] if f"{inputs}_im_mask" in reference.files else np.zeros(embeds.shape[:2])
        real = reference[f"{inputs}_attention_mask"] == 1 if name == "pad" else np.ones(embeds.shape[:2], bool)
        length = reference["ntk_ids"].shape[-1] if name == "single_after_long" else None
        errors = []
        for mode in MODES:
            if any(key.startswith(f"{name}_{mode}_logits") for key in reference.files):
                differences = logits_of(model, mode, embeds, mask, length) - output(reference, f"{name}_{mode}_logits")
                errors.append(np.abs(differences[real]).max())
        if errors:
            rows.append(row(f"{folder.name}: logits, {title}", errors, 1e-4))
    return rows


def check_cached(folder: Path) -> list[Row]:
    """Logits of a prompt and of each further token, with a cache, beyond the trained length."""
    reference, assistant = np.load(folder / "llm.npz"), Assistant(load_model(folder), None)
    sample = sample_of(reference["cache_ids"], reference["cache_image"][0], assistant.model.config)
    decoder = assistant.engine.decoder([sample], len(reference["cache_step_ids"]), "write")
    ours = [decoder.prefill(), *(decoder.step(np.array([token])) for token in reference["cache_step_ids"])]
    errors = np.abs(np.concatenate(ours) - output(reference, "cache_write_logits")[0]).max(-1)
    return [row(f"{folder.name}: logits with a cache, beyond the trained length", errors, 1e-4)]


def check_whole_model(folder: Path) -> list[Row]:
    """Logits from ids and pixels of real tile size."""
    reference = np.load(folder / "vision.npz")
    if "e2e_ids" not in reference.files:
        return []
    image = normalise(reference["merge_1x1_image_u8"])
    errors = [np.abs(whole_model_logits(folder, reference["e2e_ids"], image, mode)[-16:]
                     - reference[f"e2e_logits_last16_{mode}"][0]).max() for mode in MODES]
    return [row(f"{folder.name}: logits from ids and pixels", errors, 1e-4)]


def padded_columns(model: IXC25Model, rows: list[tuple], length: int) -> list[Tensor]:
    """Arguments of the training loss, of rows `(ids, images, labels)`; labels are not shifted."""
    config, columns = model.config, []
    for ids, images, labels in rows:
        batch = sample_of(ids, images, config).pad(length, config.max_tiles, config.max_tiles, config.pad_token_id)
        labels = np.pad(labels, (0, length - len(labels)), constant_values=-100).astype(np.int32)
        columns.append({**batch, "labels": shift_labels(labels)})
    return [Tensor(np.stack([row[name] for row in columns])) for name in BATCH_COLUMNS]


def training_batch(folder: Path, mode: str) -> tuple[IXC25Model, list[Tensor]]:
    """Model and input tensors of `train.npz` in a mode, dropout off."""
    reference = np.load(folder / "train.npz")
    length = reference["ids"].shape[1]
    model = load_model(folder, seq_length=length, max_tiles=7, plora_dropout=0.0, adapter_mode=mode)
    rows = [(ids, [reference[f"image_{-mark - 1}"][0] for mark in sorted(set(ids[ids < 0].tolist()), reverse=True)],
             np.where(real == 1, labels, -100))
            for ids, real, labels in zip(reference["ids"], reference["attention_mask"], reference["labels"])]
    return model, padded_columns(model, rows, length)


class Gradients:
    """Loss and gradients of a network, by parameter name.

    Args:
        network: gives the loss, or a tuple that begins with it.
        weights: parameters to differentiate by.
    """

    def __init__(self, network: nn.Cell, weights: list[Parameter]):
        self.names = [weight.name for weight in weights]
        self.function = ms.value_and_grad(network, None, weights)

    def __call__(self, *inputs: Tensor) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = self.function(*inputs)
        return float(loss.asnumpy()), {name: value.asnumpy() for name, value in zip(self.names, gradients)}


class AdamW:
    """AdamW with decoupled weight decay on every parameter, in float64 on the host.

    Args:
        weights: the parameters.
    """

    def __init__(self, weights: list[Parameter]):
        self.weights, self.count = weights, 0
        self.values = {weight.name: weight.asnumpy().astype(np.float64) for weight in weights}
        self.moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in self.values.items()}

    def step(self, gradients: dict[str, np.ndarray]) -> None:
        """Moves every parameter by its gradient."""
        self.count += 1
        for weight in self.weights:
            gradient, value = gradients[weight.name].astype(np.float64), self.values[weight.name]
            means = self.moments[weight.name]
            for moment, beta, new in zip(means, BETAS, (gradient, gradient ** 2)):
                moment += (1 - beta) * (new - moment)
            first, second = (moment / (1 - beta ** self.count) for moment, beta in zip(means, BETAS))
            value *= 1 - LEARNING_RATE * WEIGHT_DECAY
            value -= LEARNING_RATE * first / (np.sqrt(second) + EPSILON)
            F.assign(weight, Tensor(value.astype(np.float32)))      # in place: the graph goes on with this memory


def compare_gradients(title: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[Row]:
    """Rows of gradients by name: every one of the reference, and no other that is not zero."""
    errors = [gradient_error(ours[name], theirs[name], theirs) for name in theirs.keys() & ours.keys()]
    extra = [name for name in ours.keys() - theirs.keys() if ours[name].any()]
    return [row(f"{title} (relative)", errors, 1e-4),
            row(f"{title}: missing or extra", [len(theirs.keys() - ours.keys()), len(extra)])]


def check_mode(folder: Path, mode: str) -> list[Row]:
    """Loss and gradients of one mode; in mode base, the losses of optimizer steps."""
    reference, stored = np.load(folder / "train.npz"), np.load(folder / "train_grads.npz")
    model, batch = training_batch(folder, mode)
    weights = model.trainable_params()
    differentiate = Gradients(model, weights)
    loss, ours = differentiate(*batch)
    theirs = {key.removeprefix(f"{mode}/"): stored[key] for key in stored.files if key.startswith(f"{mode}/")}
    expected = float(reference[f"loss_{mode}"])
    rows = [row(f"{folder.name}: training loss, mode {mode} (relative)", [abs(loss - expected) / expected], 1e-6),
            *compare_gradients(f"{folder.name}: gradients, mode {mode}", ours, theirs)]
    if mode != "base":
        return rows
    start = {weight.name: Tensor(weight.asnumpy()) for weight in weights}
    for key, part in (("adamw_losses", "all parameters"), ("adamw_losses_vit_frozen", "tower frozen")):
        moved = [weight for weight in weights if key == "adamw_losses" or not weight.name.startswith("vit.")]
        optimizer, errors = AdamW(moved), []
        for expected in reference[key]:
            loss, gradients = differentiate(*batch)
            errors.append(abs(loss - expected) / expected)
            optimizer.step(gradients)
        rows.append(row(f"{folder.name}: losses of {len(errors)} AdamW steps, {part} (relative)", errors, 5e-6))
        for weight in weights:
            F.assign(weight, start[weight.name])
    return rows


def check_training(folder: Path) -> list[Row]:
    """`check_mode` of all modes."""
    return [found for mode in MODES for found in check_mode(folder, mode)]


def generation_errors(folder: Path, prompts: tuple[str, ...]) -> list[int]:
    """For every case of prompts with these endings, the number of ids that differ, rows of a batch one by one.

    The reference's `text` prompts are not comparable: there the repetition penalty counts the prompt, too.
    """
    reference, assistant = np.load(folder / "generate.npz"), Assistant(load_model(folder), None)
    config, errors = assistant.model.config, []
    for case in json.loads((folder / "generate.json").read_text(encoding="utf-8"))["cases"]:
        name = case["prompt"]
        if not name.endswith(prompts):
            continue
        ids = np.atleast_2d(reference[f"{name}_ids"])
        images = [reference[f"{name}_image_{i}"] for i in range(2)] if name == "batch" else [reference[f"{name}_image"]]
        real = reference["batch_attention_mask"] == 1 if name == "batch" else np.ones(ids.shape, bool)
        samples = [sample_of(row[keep], image[0], config) for row, keep, image in zip(ids, real, images)]
        options = GenerationOptions(stop_token_ids=tuple(case["eos_token_id"]), **{
            key: case[key] for key in ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty",
                                       "early_stopping")})
        for ours, theirs in zip(assistant.generate(samples, options, case["infer_mode"]), case["output_ids"]):
            errors.append(sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs)))
    return errors


def check_generation(folder: Path) -> list[Row]:
    """Generated ids of prompts within the trained length, beyond it, and of a batch padded on the left."""
    return [row(f"{folder.name}: generate, {title}", generation_errors(folder, prompts))
            for title, prompts in (("within the trained length", ("_p0", "_p1")), ("beyond it", ("_p2",)),
                                   ("batch", ("batch",)))]


def check_sampling(folder: Path) -> list[Row]:
    """Probabilities after repetition penalty, temperature, top-k and top-p."""
    reference, errors = np.load(folder / "sampling.npz"), []
    for number, (penalty, temperature, k, p) in enumerate(reference["settings"].tolist()):
        options = GenerationOptions(temperature=temperature, top_k=int(k), top_p=p)
        scores = apply_repetition_penalty(reference["logits"], reference["previous_ids"], penalty)
        errors.append(np.abs(softmax(warp(scores, options)) - reference[f"probs_{number}"]).max())
    return [row(f"{folder.name}: sampling filters", errors, 1e-6)]


class PairLoss(nn.Cell):
    """Sigmoid DPO loss of chosen answers followed by as many rejected ones, with the log-probabilities of all.

    Args:
        model: the policy.
        reference: of each pair, what the reference model's log-probabilities of its two answers differ by.
        beta: of the loss.
    """

    def __init__(self, model: IXC25Model, reference: np.ndarray, beta: float):
        super().__init__(auto_prefix=False)
        self.model, self.reference, self.beta = model, Tensor(reference.astype(np.float32)), beta

    def log_probabilities(self, input_ids, labels, *pictures):
        """Summed log-probabilities of the labels, `(B,)`."""
        log_probabilities = F.log_softmax(self.model.logits(input_ids, *pictures), -1)
        picked = F.gather_elements(log_probabilities, 2, F.maximum(labels, 0).expand_dims(-1))[..., 0]
        return (picked * (labels >= 0).astype(ms.float32)).sum(-1)

    def construct(self, *columns):
        """The loss, a scalar."""
        found = self.log_probabilities(*columns)
        pairs = found.shape[0] // 2
        return -F.log(F.sigmoid(self.beta * (found[:pairs] - found[pairs:] - self.reference))).mean()


class PairLogps(nn.Cell):
    """The log-probabilities of `PairLoss` as a graph of their own."""

    def __init__(self, loss: PairLoss):
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, *columns):
        """`PairLoss.log_probabilities`."""
        return self.loss.log_probabilities(*columns)


def pair_batch(folder: Path, model_folder: Path) -> tuple[IXC25Model, list[Tensor]]:
    """A model and the pairs of `dpo.npz` as one batch: the chosen answers, then the rejected ones."""
    reference, rows = np.load(folder / "dpo.npz"), []
    length = reference["rejected_ids"].shape[1]
    model = load_model(model_folder, seq_length=length, max_tiles=4, plora_dropout=0.0)
    for side in ("chosen", "rejected"):
        rows += [(ids, reference[f"image_{i}"][0], labels)
                 for i, (ids, labels) in enumerate(zip(reference[f"{side}_ids"], reference[f"{side}_labels"]))]
    return model, padded_columns(model, rows, length)


def check_dpo(folder: Path) -> list[Row]:
    """Log-probabilities of policy and reference, loss, gradients of the policy, and all that after one step."""
    reference, beta, ours = np.load(folder / "dpo.npz"), float(np.load(folder / "dpo.npz")["beta"]), {}
    with tempfile.TemporaryDirectory() as other:
        shutil.copyfile(folder / "config.json", Path(other, "config.json"))
        shutil.copyfile(folder / "dpo_ref_model.safetensors", Path(other, "model.safetensors"))
        model, batch = pair_batch(folder, Path(other))
        found = PairLogps(PairLoss(model, np.zeros(2), beta))(*batch).asnumpy().astype(np.float64)
    ours["reference_chosen_logps"], ours["reference_rejected_logps"] = found[:2], found[2:]
    model, batch = pair_batch(folder, folder)
    network = PairLoss(model, found[:2] - found[2:], beta)
    differentiate, logps = Gradients(network, model.trainable_params()), PairLogps(network)
    for after in ("", "_after_step"):
        found = logps(*batch).asnumpy()
        ours[f"policy_chosen_logps{after}"], ours[f"policy_rejected_logps{after}"] = found[:2], found[2:]
        ours[f"loss{after}"], gradients = differentiate(*batch)
        if not after:
            theirs = {key[5:]: reference[key] for key in reference.files if key.startswith("grad/")}
            rows = compare_gradients(f"{folder.name}: DPO gradients", gradients, theirs)
            AdamW(model.trainable_params()).step(gradients)
    for side in ("chosen", "rejected"):
        ours[f"{side}_rewards"] = beta * (ours[f"policy_{side}_logps"] - ours[f"reference_{side}_logps"])
    ours["reward_margin"] = ours["chosen_rewards"] - ours["rejected_rewards"]
    return [row(f"{folder.name}: DPO {name}", [np.abs(value - reference[name]).max()], 1e-4)
            for name, value in ours.items()] + rows


# The checks that need these files, all of them in the folder.
CHECKS = {("llm.npz",): [check_logits, check_cached], ("vision.npz",): [check_whole_model],
          ("train.npz", "train_grads.npz"): [check_training], ("generate.json",): [check_generation],
          ("sampling.npz",): [check_sampling], ("dpo.npz", "dpo_ref_model.safetensors"): [check_dpo]}
