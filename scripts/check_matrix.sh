#!/usr/bin/env bash
# Builds an environment for each supported pair of MindSpore and MindFormers, runs the tests in it, and ends with a table
# of what passed. The newer pair is built for Python 3.9 to 3.12, as far as they are on PATH; the older pair also runs
# the mindnlp peer, which works there only; the newest one (`next`) is asked how far it gets, which does not count.
#
# Usage: scripts/check_matrix.sh [-f FOLDER] [-o "NAME ..."] [OPTIONS AND FILES OF PYTEST ...]
#
#   -f FOLDER    where environments and logs go; one that is there is used again (default: a new temporary folder)
#   -o "NAMES"   only these: python3.9 python3.10 python3.11 python3.12 old next
#
# With options or files of pytest those are run in place of `tests`, and the peer is left out:
#
#   scripts/check_matrix.sh -f ~/matrix -o "python3.12 old" tests/processing tests/models -m "not slow"
#
# Each environment takes 2 to 3 GB. Set PIP_EXTRA_INDEX_URL to PyTorch's CPU index where pip does not find a CPU build of
# PyTorch by itself: the one on PyPI comes with several GB of CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."

folder='' only='python3.9 python3.10 python3.11 python3.12 old next'
while getopts f:o:h option; do
    case $option in
        f) folder=$OPTARG ;;
        o) only=$OPTARG ;;
        h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
for name in $only; do
    case $name in
        python3.9 | python3.10 | python3.11 | python3.12 | old | next) ;;
        *) echo "-o $name: choose from python3.9, python3.10, python3.11, python3.12, old and next." >&2; exit 2 ;;
    esac
done
folder=${folder:-$(mktemp -d)}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
status=0 rows=() ran=0

nothing=$(printf '%-9s %-10s %-12s' - - -)

can_make_environments() {   # a name may be a launcher of a Python that is not installed
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

python_for_old() {   # the first that both pairs have wheels for
    local name
    for name in python3.11 python3.10 python3.12 python3.9; do
        if can_make_environments "$name"; then echo "$name"; return; fi
    done
    return 1
}

environment() {   # name, Python
    [ -x "$folder/$1/bin/pip" ] || "$2" -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet --upgrade pip
}

install() {   # name, what to install...; the end of what pip says where it fails
    "$folder/$1/bin/pip" install --quiet "${@:2}" >>"$folder/$1.log" 2>&1 || {
        tail -n 5 "$folder/$1.log" >&2
        return 1
    }
}

versions() {   # name; Python, MindSpore, MindFormers, as columns
    "$folder/$1/bin/python" - <<'END'
from importlib import metadata
from platform import python_version
print(f"{python_version():<9} {metadata.version('mindspore'):<10} {metadata.version('mindformers'):<12}")
END
}

row() {   # name, versions, result
    [ "$2" = "$nothing" ] || ran=1
    rows+=("$(printf '%-11s %s %s' "$1" "$2" "$3")")
    echo "== $1: $3"
}

check() {   # name, what it is called, command of pytest...; the log has all, the table pytest's last line
    local name=$1 called=$2 result
    shift 2
    echo "== $called: $*"
    PATH="$folder/$name/bin:$PATH" "$@" 2>&1 | tee "$folder/$called.out" | grep -E '^(FAILED|ERROR) ' || true
    result=$(grep -E '^=* ?([0-9]+ (passed|failed|error|skipped|deselected)|no tests ran)' "$folder/$called.out" |
        tail -n 1 | tr -d = | sed 's/^ *//; s/ *$//' || true)
    case $result in
        '' | *failed* | *error* | *'no tests'*) status=1 ;;
    esac
    row "$called" "$(versions "$name")" "${result:-pytest did not get to its end: $folder/$called.out}"
}

failed() {   # name, Python; a row for an environment that could not be made
    row "$1" "$(printf '%-9s %-10s %-12s' "${2#python}" - -)" "could not be installed: $folder/$1.log"
    status=1
}

tests=("${@:-tests}")

for name in $only; do
    case $name in
        python*)
            if ! can_make_environments "$name"; then
                row "$name" "$nothing" "not here, or cannot make environments: left out"
                continue
            fi
            if ! { environment "$name" "$name" && install "$name" mindspore==2.9.0 mindformers==1.9.0 &&
                install "$name" ".[tests]"; }; then
                failed "$name" "$name"
                continue
            fi
            check "$name" "$name" pytest -q "${tests[@]}"
            ;;
        old)
            python=$(python_for_old) || { failed old -; continue; }
            # the CPU build of PyTorch first: mindnlp would otherwise take the newest from PyPI
            if ! { environment old "$python" && install old torch==2.13.0 &&
                install old mindspore==2.7.2 mindformers==1.8.0 mindnlp==0.5.0 peft==0.17.1 accelerate==1.10.1 \
                    diffusers==0.35.2 && install old ".[tests]"; }; then
                failed old "$python"
                continue
            fi
            check old old pytest -q "${tests[@]}"
            [ $# -gt 0 ] || check old mindnlp pytest -q peers/test_mindnlp.py
            ;;
        next)
            # MindFormers 2.0.0 asks for a package (hyper-parallel) that PyPI does not carry, so the newest pair goes in
            # without what it asks for
            python=$(python_for_old) || { failed next -; continue; }
            if ! { environment next "$python" && install next . &&
                install next --no-deps mindspore==2.10.0 mindformers==2.0.0; }; then
                failed next "$python"
                continue
            fi
            echo "== next: a tiny model trains and answers"
            if "$folder/next/bin/python" -m mindformers_ixc.doctor.tiny_model >"$folder/next.out" 2>&1; then
                result='a tiny model trains and answers'
            else
                result="does not run: $(grep -v '^ ' "$folder/next.out" | tail -n 1)"
            fi
            row next "$(versions next)" "$result"
            ;;
    esac
done

printf '\n%-11s %-9s %-10s %-12s %s\n' environment Python MindSpore MindFormers result
printf '%s\n' "${rows[@]}"
[ "$ran" = 1 ] || { echo "None of these environments could be made here." >&2; status=1; }
exit "$status"
