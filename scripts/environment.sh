# Makes a virtual environment, or brings it up to date; sourced by try.sh and test.sh. By uv where it is, else by the
# first Python that has MindSpore wheels (3.9 to 3.12) and can make one. The system's Python is left as it is.

python_for_mindspore() {
    local name
    for name in python3 python3.11 python3.12 python3.10 python3.9; do
        if "$name" -c 'import sys, ensurepip, venv; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' \
                >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "MindSpore has wheels for Python 3.9 to 3.12, and no such Python that can make virtual environments is here." \
        "Install uv (https://docs.astral.sh/uv/), which fetches one, or python3.11 with its package python3.11-venv." >&2
    return 1
}

environment() {   # folder, what to install...; by_pip=1 takes pip even where uv is
    local folder=$1 python
    shift
    if [ -z "${by_pip:-}" ] && command -v uv >/dev/null; then
        [ -x "$folder/bin/python" ] || uv venv --quiet --python '>=3.9,<3.13' "$folder"
        uv pip install --quiet --python "$folder/bin/python" "$@"
    else
        if [ ! -x "$folder/bin/pip" ]; then
            python=$(python_for_mindspore) || return 1
            "$python" -m venv "$folder"
            "$folder/bin/pip" install --quiet --upgrade pip
        fi
        # pip compiles one file after the other, for more than a minute; without it every import would, where
        # PYTHONDONTWRITEBYTECODE is set. Some packages bring files that are of no use and do not compile.
        "$folder/bin/pip" install --quiet --no-compile "$@"
        "$folder/bin/python" -m compileall -q -j 0 -x 'site-packages/.*/tests?/' "$folder/lib" >/dev/null 2>&1 || true
    fi
    export PATH="$(cd "$folder/bin" && pwd):$PATH"
}
