#!/usr/bin/env bash
# One command on a fresh machine: makes a virtual environment (.venv) with this package and what its tests need, then
# runs ruff, the import contracts, the types, the site of docs/ and the tests. Usage: scripts/test.sh [OPTIONS OF PYTEST], such as
# -m "not slow". MINDFORMERS_IXC_VENV is another folder for the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment "${MINDFORMERS_IXC_VENV:-.venv}" ".[tests,docs]"
ruff check .
lint-imports --no-cache
mkdocs build --strict --quiet --site-dir "$(mktemp -d)" &      # a core each for the site and the types
site=$!
mypy --cache-dir /dev/null
wait "$site"
# MindSpore's compiler makes and drops very many small objects: memory is kept instead of asked for anew
export MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=67108864 MALLOC_MMAP_THRESHOLD_=67108864
# the tests run against the installed package, as a user's do
pytest tests -n 2 --dist loadfile -q -p no:cacheprovider "$@"
