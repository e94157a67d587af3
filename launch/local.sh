#!/usr/bin/env bash
# Train on this host: one process per GPU, or, without GPUs, PROCESSES CPU processes (default 2).
#   launch/local.sh [FLAGS OF train_ddp.py]
#   PROCESSES=4 launch/local.sh --epochs 5
#   MAX_RESTARTS  how often torchrun starts the processes again when one dies; default 0
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PROCESSES:-}" ]; then
  PROCESSES=$(PYTHONPATH=$repository python -m mnist_dist.distributed.gpu_count)
  [ "$PROCESSES" -gt 0 ] || PROCESSES=2
fi
if ! [[ $PROCESSES =~ ^[1-9][0-9]*$ ]]; then
  echo "mnist-dist: error: PROCESSES=$PROCESSES: must be a number above 0; unset it for the default" >&2
  exit 2
fi
# torchrun's default, 1, makes the job choose the number by CPUs and quota.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Under nohup, torchrun must not handle SIGHUP: it is ignored then.
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2
[[ $(trap -p HUP) == "trap -- '' "* ]] || signals=$signals,SIGHUP

# --local-addr: this host's own name may resolve nowhere, and torchrun waits minutes for it.
# --standalone takes a free port, so that two jobs on this node do not share one.
exec torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node="$PROCESSES" --max-restarts="${MAX_RESTARTS:-0}" \
  --signals-to-handle="$signals" \
  "$repository/train_ddp.py" "$@"
