#!/bin/sh
# Makes .venv with exactly the pinned packages and the project itself (editable). `make` calls it
# before every target; with nothing to do it returns at once and needs no network.
#
#   LOCK=requirements/lock-gpu.txt scripts/setup.sh    choose the pins; .venv remembers the choice
#   PYTHON=/path/to/python3 scripts/setup.sh           choose the interpreter
set -eu
cd "$(dirname "$0")/.."

venv=.venv
done_with=$venv/.setup # copies of what the last successful setup saw

say() { printf '%s\n' "setup: $*"; }

is_new_enough() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    for name in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        if is_new_enough "$name"; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

lock=${LOCK:-$(cat $done_with/lock-name 2>/dev/null || echo requirements/lock.txt)}
if [ ! -f "$lock" ]; then
    say "there is no $lock; the pins are requirements/lock.txt (CPU) and requirements/lock-gpu.txt"
    exit 1
fi

# Scripts and the editable install hold absolute paths, so a .venv that was moved is made anew.
usable_venv() {
    is_new_enough $venv/bin/python && [ "$(cat $done_with/root 2>/dev/null || pwd)" = "$(pwd)" ]
}
same_packages() { usable_venv && cmp -s "$lock" $done_with/lock.txt; }
same_project() { cmp -s pyproject.toml $done_with/pyproject.toml; }

if same_packages && same_project; then
    exit 0
fi

uv=$(command -v uv || true)

if ! usable_venv; then
    python=$(find_python)
    if [ -n "$uv" ]; then
        say "making $venv with uv (${python:-Python 3.12, which uv fetches})"
        uv venv --quiet --clear --python "${python:-3.12}" $venv
    elif [ -n "$python" ]; then
        say "making $venv with $("$python" --version)"
        if ! "$python" -m venv --clear $venv; then
            rm -rf $venv
            say "$python could not make a virtual environment; on Debian or Ubuntu:" \
                "apt install python3-venv"
            exit 1
        fi
    else
        say "this project needs Python 3.12 or newer and found none. Any one of these gives it:"
        say "  uv (https://docs.astral.sh/uv), which fetches Python by itself: then run make again"
        say "  apt install python3.12 python3.12-venv    (Ubuntu 24.04; Debian 13 has python3.13)"
        say "  pyenv install 3.12    or    conda create -n py312 python=3.12"
        say "or name an interpreter: make setup PYTHON=/path/to/python3"
        exit 1
    fi
fi

if [ -n "$uv" ]; then
    install() { uv pip install --quiet --python $venv/bin/python "$@"; }
else
    $venv/bin/python -m pip --version >/dev/null 2>&1 || $venv/bin/python -m ensurepip >/dev/null
    install() {
        $venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --no-warn-script-location "$@"
    }
fi

mkdir -p $done_with
if ! same_packages; then
    rm -f $done_with/*
    say "installing the pinned packages of $lock"
    install --require-hashes -r "$lock"
    cp "$lock" $done_with/lock.txt
    printf '%s\n' "$lock" >$done_with/lock-name
    pwd >$done_with/root
fi
rm -f $done_with/pyproject.toml
say "installing dskjax (editable)"
install --no-deps --no-build-isolation --editable .
cp pyproject.toml $done_with/pyproject.toml
say "done: $($venv/bin/python --version) in $venv"
