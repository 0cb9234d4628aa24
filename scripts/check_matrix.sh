#!/usr/bin/env bash
# Builds an environment for each supported pair of MindSpore and MindFormers and runs the tests in it; the older pair
# also runs the mindnlp peer, which works there only. The newer pair is built for Python 3.10, 3.11 and 3.12, as far as
# they are here (MindSpore 2.9 has wheels for 3.9 to 3.12). Usage: scripts/check_matrix.sh [FOLDER FOR THE ENVIRONMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}

environment() {   # name [Python]
    "${2:-python3}" -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet --upgrade pip
}

names=()
for version in 3.10 3.11 3.12; do
    # a name may be a launcher of a Python that is not installed
    if ! "python$version" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        echo "== Python $version is not here, or cannot make environments: left out"
        continue
    fi
    environment "python$version" "python$version"
    "$folder/python$version/bin/pip" install --quiet mindspore==2.9.0 mindformers==1.9.0
    "$folder/python$version/bin/pip" install --quiet ".[tests]"
    names+=("python$version")
done

environment old
# the CPU build of PyTorch first: mindnlp would otherwise pull in several GB of CUDA packages
# (set PIP_EXTRA_INDEX_URL to PyTorch's CPU index where pip does not find such a build by itself)
"$folder/old/bin/pip" install --quiet torch==2.13.0
"$folder/old/bin/pip" install --quiet mindspore==2.7.2 mindformers==1.8.0 mindnlp==0.5.0 peft==0.17.1 \
    accelerate==1.10.1 diffusers==0.35.2
"$folder/old/bin/pip" install --quiet ".[tests]"

# MindFormers 2.0.0 asks for a package (hyper-parallel) that PyPI does not carry, so the newest pair goes in without what
# it asks for. How far it gets is reported and does not count.
environment next
"$folder/next/bin/pip" install --quiet ".[tests]"
"$folder/next/bin/pip" install --quiet --no-deps mindspore==2.10.0 mindformers==2.0.0

status=0
for name in "${names[@]}" old; do
    echo "== $("$folder/$name/bin/python" --version), $("$folder/$name/bin/pip" list 2>/dev/null | grep -E '^mind(spore|formers) ' | tr -s ' ' | paste -sd, -)"
    PATH="$folder/$name/bin:$PATH" "$folder/$name/bin/pytest" tests -q || status=1
done
echo "== mindformers 2.0.0,mindspore 2.10.0: training a tiny model and asking it"
"$folder/next/bin/python" -m mindformers_ixc.doctor.tiny_model || echo "the newest pair does not run"
PATH="$folder/old/bin:$PATH" "$folder/old/bin/pytest" peers/test_mindnlp.py -q || status=1
exit $status
