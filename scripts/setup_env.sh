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
    ) || return 1 # and so nothing in there ends at once, whatever the caller's `set -e`
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
    local root="$1" venv="$1/.venv" log="$1/.venv/pip.log" base constraints wanted
    base="$(_base_python)" || return 1
    # An unfinished set-up, or an environment whose interpreter is gone, is not worth mending.
    if [ -e "$venv/.unfinished" ] || { [ -e "$venv" ] && ! "$venv/bin/python" -c '' 2>/dev/null; }; then
        rm -rf "$venv"
    fi
    echo "Setting up $venv with $("$base" --version): some minutes, the first time only." >&2
    if [ ! -e "$venv" ] && ! { mkdir "$venv" && touch "$venv/.unfinished" && "$base" -m venv "$venv" >&2; }; then
        echo "Setting up $venv failed (see above). Run the same command again to try again." >&2
        return 1
    fi
    if [ -e "$venv/.recipe" ]; then mv "$venv/.recipe" "$venv/.unfinished"; fi
    local device=gpu
    if [ "$(count_gpus)" -eq 0 ]; then device=cpu; fi
    constraints=(--constraint "$root/scripts/constraints.txt" --constraint "$root/scripts/constraints-$device.txt")
    if ! wanted="$("$venv/bin/python" "$root/scripts/check_env.py" --list liger dev)"; then
        echo "$root/pyproject.toml does not say what to install." >&2
        return 1
    fi
    mapfile -t wanted <<<"$wanted"
    echo "Fetching ${wanted[*]%%>=*} and what they need; pip's own words go to $log" >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile "${constraints[@]}" "${wanted[@]}" 2>&1 |
        tee "$log" | _show_progress >&2
    if [ "${PIPESTATUS[0]}" -ne 0 ]; then
        echo "Setting up $venv failed: $(_why_pip_failed "$log"). Then run the same command again. pip's log: $log" >&2
        return 1
    fi
    # pip would compile it on one core, with what hardly anyone imports. Some files are for another Python.
    "$venv/bin/python" -m compileall -qq -j 0 -x 'site-packages/.*/tests/|/transformers/models/' "$venv/lib" || true
    _venv_recipe "$root" >"$venv/.recipe"
    rm -f "$venv/.unfinished"
}

# Of what pip says: how many packages are there, of how many so far, and their size; a bar on a terminal, else now and
# then a line. pip names all that it needs ("Collecting") before it fetches most of it.
_show_progress() {
    local line file total=0 fetched=0 kb=0 size said bar="===================="
    local fetches='^ *(Downloading|Using cached|Processing) ([^ ]+)( \(([0-9]+)(\.[0-9]+)? ([kM])B)?'
    while IFS= read -r line; do
        case "$line" in Collecting\ * | Processing\ *) total=$((total + 1)) ;; esac
        if [[ "$line" == "Installing collected packages: "* ]]; then
            said="Installing $(tr -cd , <<<"$line," | wc -c | tr -d ' ') packages"
            if [ -t 2 ]; then printf '\r\033[K'; fi
            echo "$said, of which $fetched were fetched: $((kb / 1000)) MB"
        fi
        if ! [[ "$line" =~ $fetches ]] || [[ "${BASH_REMATCH[2]}" == *.metadata ]]; then continue; fi
        file="${BASH_REMATCH[2]##*/}" size="${BASH_REMATCH[4]:-0}" # without one: "(512 bytes)"
        if [ "${BASH_REMATCH[6]:-}" = M ]; then size=$((size * 1000)); fi
        fetched=$((fetched + 1)) kb=$((kb + size))
        if [ "$fetched" -gt "$total" ]; then total="$fetched"; fi
        said="$fetched of $total packages, $((kb / 1000)) MB: ${file%%-[0-9]*}"
        if [ -t 2 ]; then
            printf '\r\033[K[%-20s] %s' "${bar:0:$((20 * fetched / total))}" "$said"
        elif [ "$size" -ge 100000 ] || [ $((fetched % 20)) -eq 0 ]; then
            echo "$said"
        fi
    done
}

# What went wrong, and what to do.
_why_pip_failed() {
    local proxy="set HTTPS_PROXY to your proxy, or PIP_INDEX_URL to a mirror that this machine reaches"
    if grep -q 'No space left on device' "$1"; then
        echo "the disk is full; make room, here or where TMPDIR is"
    elif grep -qiE 'certificate verify failed' "$1"; then
        echo "the package index has a certificate that is not known here; set PIP_CERT to your proxy's"
    elif grep -qiE 'connection broken|ProxyError|ConnectionPool|Connection(Failed|Error)|name resolution' "$1"; then
        echo "the package index cannot be reached: no network, or a proxy is needed; $proxy"
    else
        echo "$(grep '^ERROR' "$1" | tail -1); see the log"
    fi
}

# The active python3 where it is new enough, else another one of this machine.
_base_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed, and none was found on the PATH." >&2
    return 1
}
