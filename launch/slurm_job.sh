# What the sbatch scripts share; they source it behind their EDIT block.
#   run_step SRUN_ARGUMENTS COMMAND...   runs the job step and does what Slurm's signals ask for
# Reads REPOSITORY, ACTIVATE, INTERFACE and MAX_REQUEUES; sets tasks_per_node, cpus_per_task.
# shellcheck shell=bash
set -o pipefail

say() { echo "launch: $*" >&2; }

if ! cd "$REPOSITORY" || [ ! -e train_ddp.py ]; then
  say "REPOSITORY=$REPOSITORY: no train_ddp.py there; submit from the checkout, or set it"
  exit 2
fi
if [ -n "$ACTIVATE" ]; then
  # shellcheck source=/dev/null
  . "$ACTIVATE" || { say "ACTIVATE=$ACTIVATE: set it to the file that activates your environment"; exit 2; }
fi
if ! [[ $MAX_REQUEUES =~ ^[0-9]+$ ]]; then
  say "MAX_REQUEUES=$MAX_REQUEUES: must be a whole number"
  exit 2
fi
set -u # not before: some activation scripts fail with it

# One process per GPU where there are GPUs, else per task of the header.
tasks_per_node=${SLURM_GPUS_ON_NODE:-0}
[ "$tasks_per_node" -gt 0 ] || tasks_per_node=${SLURM_NTASKS_PER_NODE:-1}
cpus_per_task=${SLURM_CPUS_PER_TASK:-1}
# Since Slurm 22.05 srun does not inherit --cpus-per-task.
export SRUN_CPUS_PER_TASK=$cpus_per_task
if [ -n "$INTERFACE" ]; then
  export INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
export PYTHONUNBUFFERED=1

# The run of this job, by the name that train_ddp.py gives it.
job=slurm-${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}-}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
warned=false

run_directory() { # FLAGS: --run-dir if it is among them, else the newest that has the job's number
  local directory=
  while [ $# -gt 0 ]; do
    case $1 in
      --run-dir) directory=${2:-} ;;
      --run-dir=*) directory=${1#*=} ;;
    esac
    shift
  done
  [ -n "$directory" ] || for directory in runs/*_"$job"; do :; done
  echo "$directory"
}

status_of() { # DIRECTORY FIELD
  sed -n "s/^ *\"$2\": \"\{0,1\}\([^\",]*\).*/\1/p" "$1/status.json" 2>/dev/null
}

# The signal goes to the processes. To srun itself it would kill them at once; the batch shell
# alone gets the warning of --signal=B:USR1, and Slurm itself sends TERM to all.
warn_step() {
  warned=true
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}

# Slurm signals only the processes of a preempted job, not this shell: query it.
preempted() { scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q "PreemptTime=[0-9]"; }

run_step() {
  trap warn_step USR1
  trap 'warned=true' TERM
  srun --kill-on-bad-exit=1 "$@" &
  local step=$! code=0
  # A trapped signal ends `wait` too, so wait until there is nothing to wait for.
  while kill -0 "$step" 2>/dev/null; do wait "$step" && code=0 || code=$?; done
  wait "$step" && code=0 || code=$?
  finish "$code" "$(run_directory "$@")"
}

finish() { # CODE RUN_DIRECTORY: torchrun ends with 1 after a clean stop, so the status decides
  local status resumable state
  status=$(status_of "$2" status) resumable=$(status_of "$2" resumable)
  say "the step ended with $1; the run in $2 is ${status:-not started}"
  [ "$status" != completed ] || exit 0
  [ "$resumable" = true ] || { [ -z "$status" ] && { $warned || preempted; }; } || exit $(($1 > 0 ? $1 : 1))
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null)
  # A running job is SIGNALING for the moment in which Slurm signals it.
  if [ "$state" != RUNNING ] && [ "$state" != SIGNALING ]; then # cancelled, or Slurm requeues it itself
    say "job $SLURM_JOB_ID is ${state:-gone}: not requeued from here"
  elif [ "$restarts" -ge "$MAX_REQUEUES" ]; then
    say "requeued $restarts times already (MAX_REQUEUES=$MAX_REQUEUES); sbatch --export=ALL,MAX_REQUEUES=N allows more"
  else # printed first: Slurm ends this script while it requeues the job
    say "requeued: restart $((restarts + 1)) of at most $MAX_REQUEUES"
    scontrol requeue "$SLURM_JOB_ID" || say "scontrol requeue failed; submit the same sbatch command to continue"
  fi
  exit $(($1 > 0 ? $1 : 1))
}

say "job $SLURM_JOB_ID, restart $restarts, $SLURM_JOB_NUM_NODES node(s) of $tasks_per_node processes: $SLURM_JOB_NODELIST"
if [ "$restarts" -gt "$MAX_REQUEUES" ]; then
  say "restarted $restarts times already (MAX_REQUEUES=$MAX_REQUEUES): giving up"
  exit 1
fi
