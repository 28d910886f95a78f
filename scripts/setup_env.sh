# Sourced by run_train.sh and scripts/test.sh. Defines
#
#   setup_env [extra ...]    sets PYTHON to an interpreter with the package's dependencies and those of the extras
#   count_gpus               prints the number of this machine's NVIDIA GPUs
#
# That is the active python3 where it has them all already: then nothing is installed. Otherwise it is .venv in the
# repository, made and filled on first use with every extra, at the versions that scripts/constraints*.txt pin.

setup_env() {
    local root
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    # A python3 below 3.11 fails here too: it has no tomllib.
    if PYTHON="$(python3 "$root/scripts/check_env.py" "$@" 2>/dev/null)"; then return; fi
    PYTHON="$root/.venv/bin/python"
    if _venv_is_current "$root"; then return; fi
    (
        # One set-up at a time, whoever started it: the lock is on a file that is always there.
        if command -v flock >/dev/null; then exec 9<"$root/pyproject.toml" && flock 9; fi
        _venv_is_current "$root" || _fill_venv "$root"
    ) || {
        echo "Setting up $root/.venv failed (see above). Run the same command again to try again." >&2
        return 1
    }
}

# Everything that decides what .venv holds. A copy of it lies in a filled .venv as its stamp.
_venv_recipe() { cat "$1"/pyproject.toml "$1"/scripts/constraints*.txt; }

_venv_is_current() { [ -x "$1/.venv/bin/python" ] && _venv_recipe "$1" | cmp -s - "$1/.venv/.recipe"; }

count_gpus() {
    local gpus
    gpus="$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)"
    # Not everywhere are they there (WSL); nvidia-smi knows too, but takes a second.
    if [ "$gpus" -eq 0 ]; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    echo "$gpus"
}

_fill_venv() {
    local root="$1" venv="$1/.venv" base constraints wanted
    base="$(_base_python)" || return 1
    # An unfinished set-up, or an environment whose interpreter is gone, is not worth mending.
    if [ -e "$venv/.unfinished" ] || { [ -e "$venv" ] && ! "$venv/bin/python" -c '' 2>/dev/null; }; then
        rm -rf "$venv"
    fi
    echo "Setting up $venv with $("$base" --version): some minutes, the first time only." >&2
    if [ ! -e "$venv" ]; then mkdir "$venv" && touch "$venv/.unfinished" && "$base" -m venv "$venv" || return 1; fi
    if [ -e "$venv/.recipe" ]; then mv "$venv/.recipe" "$venv/.unfinished"; fi
    local device=gpu
    if [ "$(count_gpus)" -eq 0 ]; then device=cpu; fi
    constraints=(--constraint "$root/scripts/constraints.txt" --constraint "$root/scripts/constraints-$device.txt")
    if ! wanted="$("$venv/bin/python" "$root/scripts/check_env.py" --list liger dev)"; then
        echo "$root/pyproject.toml does not say what to install." >&2
        return 1
    fi
    mapfile -t wanted <<<"$wanted"
    "$venv/bin/python" -m pip install --disable-pip-version-check "${constraints[@]}" "${wanted[@]}" >&2 || return 1
    _venv_recipe "$root" >"$venv/.recipe"
    rm -f "$venv/.unfinished"
}

# The active python3 where it is new enough, else another one of this machine.
_base_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed, and none was found on the PATH." >&2
    return 1
}
