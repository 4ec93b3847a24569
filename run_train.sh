#!/usr/bin/env bash
# ./run_train.sh                      the default job, end to end, on whatever this machine has
# ./run_train.sh --config a.toml ...  any job: NGPU ranks (default: all GPUs, or one CPU process)
# Several machines: NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host:29500 ./run_train.sh ...   on each
# LOG_RANK=0,1 chooses the ranks that are shown (default 0); all write logs/rank_N.log in the run folder.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/tools/env.sh"
nanovl_environment ""

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
ranks=${NGPU:-$((gpus > 0 ? gpus : 1))}
nodes=${NNODES:-1}
export LOG_RANK=${LOG_RANK:-0}
cores=$( (nproc || getconf _NPROCESSORS_ONLN) 2>/dev/null)
threads=$((cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# idle threads sleep instead of spinning, so that ranks on one machine do not starve each other
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}

train() {
    if [ "$ranks" = 1 ] && [ "$nodes" = 1 ]; then
        "$PYTHON" -m nanovl train "$@"
        return
    fi
    # a restarted worker must not find the addresses of the dead ones in a shared store
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    local where=(--standalone)
    if [ "$nodes" != 1 ]; then
        : "${RDZV_ENDPOINT:?NNODES=$nodes needs RDZV_ENDPOINT=host:port, the same on every machine}"
        where=(--nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
            --rdzv-id "${RDZV_ID:-nanovl}")
    fi
    "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc-per-node "$ranks" -m nanovl train "$@"
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
