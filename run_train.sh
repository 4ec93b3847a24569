#!/usr/bin/env bash
# ./run_train.sh                      the default job, end to end, on whatever this machine has
# ./run_train.sh --config a.toml ...  any job: NGPU ranks (default: all GPUs, or one CPU process)
# Several machines: NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host:29500 ./run_train.sh ...   on each (docs/launch.md)
# MAX_RESTARTS=3 starts all ranks again when one dies, from the newest checkpoint.
# LOG_RANK=0,1 chooses the ranks that are shown (default 0); all write logs/rank_N.log in the run folder.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/tools/env.sh"
nanovl_environment ""

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
ranks=${NGPU:-$((gpus > 0 ? gpus : 1))}
nodes=${NNODES:-1}
restarts=${MAX_RESTARTS:-0}
export LOG_RANK=${LOG_RANK:-0}
cores=$( (nproc || getconf _NPROCESSORS_ONLN) 2>/dev/null)
threads=$((cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# idle threads sleep instead of spinning, so that ranks on one machine do not starve each other
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}

# Runs a command as a process group of its own, so that Ctrl-C reaches it once, and hands every signal on to it.
supervised() {
    local child code=0
    set -m
    "$@" &
    child=$!
    set +m
    # shellcheck disable=SC2064 # $child is local
    trap "kill -TERM $child 2>/dev/null || :" TERM INT HUP
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends wait, not the child
        code=0
        wait "$child" || code=$?
    done
    trap - TERM INT HUP
    return "$code"
}

train() {
    if [ "$ranks" = 1 ] && [ "$nodes" = 1 ] && [ "$restarts" = 0 ]; then
        supervised "$PYTHON" -m nanovl train "$@"
        return
    fi
    # a restarted worker must not find the addresses of the dead ones in a shared store
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # seconds that ranks have to save after a signal (torch 2.11 does not read it: 30)
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
    local where=(--standalone)
    if [ "$nodes" != 1 ]; then
        : "${RDZV_ENDPOINT:?NNODES=$nodes needs RDZV_ENDPOINT=host:port, the same on every machine}"
        if [ "$restarts" != 0 ] || [[ $nodes == *:* ]]; then
            : "${RDZV_ID:?restarts need RDZV_ID, a new name for every launch: a restarted rank knows its own run by it}"
        fi
        where=(--nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
            --rdzv-id "${RDZV_ID:-none}")
    fi
    local code=0 scratch
    scratch=$(mktemp -d)
    NANOVL_EXIT_CODE_FILE=$scratch/code supervised "$PYTHON" -m torch.distributed.run "${where[@]}" \
        --nproc-per-node "$ranks" --max-restarts "$restarts" -m nanovl train "$@" || code=$?
    # torchrun says 1 for whatever its ranks say; 75 = a signal stopped them after they had saved
    [ "$code" = 0 ] || [ ! -s "$scratch/code" ] || code=$(<"$scratch/code")
    rm -rf "$scratch"
    return "$code"
}

if [ $# -gt 0 ]; then
    train "$@"
    exit
fi
cd "$ROOT"
train --config configs/quickstart.toml
echo
echo "The checkpoint, loaded by the engine:"
"$PYTHON" -m nanovl generate runs/quickstart --prompt "import os" --prompt "def main(" --max-tokens 64 --temperature 0.8 --top-k 50
echo
echo "Report: runs/quickstart/report.md"
echo "Next:   $([ "$PYTHON" = "$ROOT/.venv/bin/python" ] && echo "source .venv/bin/activate; ")nanovl chat runs/quickstart"
