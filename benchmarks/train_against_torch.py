"""Losses of 50 training steps through MindFormers' Trainer against PyTorch: same weights, batches, rates and AdamW.

    python benchmarks/train_against_torch.py [--steps 50]

Every part trains (vision tower, projector, separators, Partial LoRA, language model), on the demo pictures, with
clipping. Dropout is off: the two libraries draw other noise. Prints the largest relative difference of a step.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "yaml_configs" / "ixc25_sft_tiny.yaml"
BAR = 1e-3


def run(folder: Path, steps: int) -> list[dict]:
    """Trains through the command line; returns the rows of its log."""
    words = ["--load_checkpoint", folder / "start", "--output_dir", folder / "out", "--epochs", -(-steps // 14),
             "--model.model_config.plora_dropout", "0.0", "--callbacks", "[{type: MFLossMonitor}]"]
    command = [str(Path(sys.executable).parent / "mindformers"), "run", "--config", CONFIG, "--run_mode", "finetune"]
    done = subprocess.run([*map(str, command), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()][:steps]


def main() -> int:
    """Runs both sides; returns 0 if every step is within the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    steps = parser.parse_args().steps

    import mindspore as ms
    from mindformers.dataset.build_dataset import build_dataset
    from mindformers.tools.register import MindFormerConfig
    from torch_training import TorchTrainer

    from mindformers_ixc.checkpoint.model_directory import save_model_directory
    from mindformers_ixc.cli.yaml_file import read_yaml
    from mindformers_ixc.data.batch import BATCH_COLUMNS
    from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
    from mindformers_ixc.models.configuration import IXC25Config

    fields = read_yaml(CONFIG)
    data = {**fields["train_dataset"], "input_columns": list(BATCH_COLUMNS)}
    model_fields = {**fields["model"]["model_config"], "plora_dropout": 0.0}
    ms.set_context(mode=0)
    ms.set_seed(1)
    model = IXC25ForCausalLM(IXC25Config(**{key: value for key, value in model_fields.items() if key != "type"}))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model_directory(model, folder / "start", data["tokenizer"]["vocab_file"].replace(
            "pkg:mindformers_ixc", str(CONFIG.parent.parent / "mindformers_ixc")))
        rows = run(folder, steps)
    dataset = build_dataset(MindFormerConfig(type="IXC25SFTDataset", dataset_config=MindFormerConfig(**data)))
    torch_side = TorchTrainer({p.name: p.asnumpy().copy() for p in model.get_parameters()}, model.config)
    worst, number = 0.0, 0
    iterator = dataset.create_tuple_iterator(num_epochs=-(-steps // dataset.get_dataset_size()), output_numpy=True)
    print(f"{'step':>4}{'this project':>16}{'PyTorch':>16}{'relative':>12}")
    while number < steps:
        for batch in iterator:
            if number == steps:
                break
            row = rows[number]
            loss = torch_side.step(dict(zip(BATCH_COLUMNS, batch)), row["learning_rate"])
            difference = abs(row["loss"] - loss) / loss
            worst, number = max(worst, difference), number + 1
            if number % 10 == 0 or number == 1:
                print(f"{number:>4}{row['loss']:>16.6f}{loss:>16.6f}{difference:>12.1e}")
    print(f"largest relative difference over {steps} steps: {worst:.1e} (bar {BAR:.0e})")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
