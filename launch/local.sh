#!/usr/bin/env bash
# Train on this host: one process per GPU, or, without GPUs, PROCESSES CPU processes (default 2).
#   launch/local.sh [FLAGS OF train_ddp.py]
#   PROCESSES=4 launch/local.sh --epochs 5
#   MAX_RESTARTS  how often torchrun starts the processes again when one dies; default 0
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PROCESSES:-}" ]; then
  PROCESSES=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
  [ "$PROCESSES" -gt 0 ] || PROCESSES=2
fi
# torchrun's own default is one thread a process, whatever the cores.
threads=$(($(nproc) / PROCESSES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# --standalone takes a free port, so that two jobs on this node do not share one.
exec torchrun --standalone --nproc_per_node="$PROCESSES" --max-restarts="${MAX_RESTARTS:-0}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
  "$repository/train_ddp.py" "$@"
