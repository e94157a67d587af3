#!/usr/bin/env bash
# Train on this host: one process per GPU, or, without GPUs, PROCESSES CPU processes (default 2).
#   launch/local.sh [FLAGS OF train_ddp.py]
#   PROCESSES=4 launch/local.sh --epochs 5
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
if [ "$gpus" -gt 0 ]; then default=$gpus; else default=2; fi
processes=${PROCESSES:-$default}

# torchrun's default is one thread a process, whatever the cores.
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

exec torchrun --nproc_per_node="$processes" "$repository/train_ddp.py" "$@"
