#!/usr/bin/env bash
# Train: set up what is missing (on first use), check the options, start one process per GPU with torchrun.
#
#   ./run_train.sh [--section.option value ...]        options of the run; they override the TOML (--help lists them)
#
#   CONFIG_FILE=...   TOML file of the run             (default: the debug model)
#   NGPU=...          processes on this machine        (default: its GPUs, or 1 where there is none)
#   LOG_RANK=...      local ranks whose log is shown   (default: 0; e.g. 0,3)
#
# Several machines: start this on each of them, with torchrun's own flags among the arguments:
#
#   NGPU=8 ./run_train.sh --nnodes 4 --rdzv_endpoint first-host:29500 --rdzv_id my-run --max_restarts 3 ...
#
# scripts/multinode_trainer.slurm does it under SLURM. Exit status: 0, a failed worker's own, 130 after Ctrl-C, 143
# after SIGTERM. An active Python that has the dependencies is used as it is; otherwise .venv is made here.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as `sh run_train.sh` starts it
set -euo pipefail

unset CDPATH # which has cd go elsewhere, and say so
root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
source "$root/scripts/setup_env.sh"
setup_env

gpus="$(count_gpus)"
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^ *[0-9A-Za-z]' || true)" # empty and -1 hide them all
fi
NGPU="${NGPU:-$((gpus > 0 ? gpus : 1))}"
if ! [[ "$NGPU" =~ ^[1-9][0-9]*$ ]]; then
    echo "NGPU=$NGPU: expected the number of processes to start, 1 or more" >&2
    exit 1
fi

# The code is this checkout's, also where the current folder has a torchtitan/ of its own, which -m alone would take.
export PYTHONSAFEPATH=1 PYTHONPATH="$root:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m torchtitan.launch \
    --num_gpus "$gpus" --nproc_per_node "$NGPU" --local_ranks_filter "${LOG_RANK:-0}" \
    --job.config_file "${CONFIG_FILE:-$root/torchtitan/models/llama3/train_configs/debug_model.toml}" "$@"
