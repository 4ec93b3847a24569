#!/usr/bin/env bash
# ./run_tests.sh [pytest arguments]   set up what the tests need, then run them; -m slow for the exhaustive ones
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/tools/env.sh"
nanovl_environment dev
cd "$ROOT"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ $# -gt 0 ] || set -- -m "not slow"
exec "$PYTHON" -m pytest "$@"
