#!/usr/bin/env bash
# One command on a fresh machine: makes a virtual environment (.venv) with this package, trains the tiny model on the
# demo pictures (out/, one to two minutes on a laptop) and asks it about one of them. A second call only asks.
# Usage: scripts/try.sh ["QUESTION"]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
echo "Installing into .venv (MindSpore is a few hundred MB)..." >&2
environment .venv .
[ -d out/model ] || mindformers run --config yaml_configs/ixc25_sft_tiny.yaml --output_dir out --overwrite
mindformers chat --model out/model --image mindformers_ixc/demo/images/cat.jpg "${1:-What is shown in the picture?}"
echo "Go on: . .venv/bin/activate, then \`mindformers init\` for your own pictures." >&2
