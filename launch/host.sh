#!/usr/bin/env bash
# One node's part of a run over several nodes, with torchrun: start it on every node.
#   launch/host.sh HEAD:PORT NODES NODE_RANK [FLAGS OF train_ddp.py]
#   launch/host.sh n1:29400 2 0 --epochs 5     on n1, which must be the host of NODE_RANK 0
#   launch/host.sh n1:29400 2 1 --epochs 5     on the other
# NODES may be MIN:MAX, e.g. 1:2: the run continues when a node is lost, and includes one that joins.
#   PROCESSES     on this node; default: its GPUs, else 2
#   RUN_ID        the same on all nodes; default: HEAD-PORT
#   INTERFACE     to reach the other nodes, e.g. eth0 or ib0; default: the one that leads to HEAD
#   MAX_RESTARTS  how often torchrun starts the processes again when one dies; default 3
#   SETUP_TIMEOUT seconds to wait for HEAD; default 600
#   RDZV_CONF     additional entries of torchrun's --rdzv-conf, e.g. keep_alive_interval=1
set -euo pipefail

usage() { sed -n '3,5s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 3 ] || usage
head=${1%:*} port=${1##*:} hosts=$2 node_rank=$3
shift 3
[[ $port =~ ^[0-9]{1,5}$ && $hosts =~ ^[0-9]{1,5}(:[0-9]{1,5})?$ && $node_rank =~ ^[0-9]{1,5}$ ]] || usage
fail() { echo "mnist-dist: error: $1" >&2; exit 2; }
most=$((10#${hosts#*:}))
((10#$port >= 1 && 10#$port <= 65535)) || fail "port $port: must be 1 to 65535"
((10#${hosts%:*} >= 1 && 10#${hosts%:*} <= most)) || fail "NODES $hosts: must be 1 or more, or MIN:MAX"
((10#$node_rank < most)) || fail "NODE_RANK $node_rank: must be 0 to $((most - 1)) for NODES $hosts"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -z "${PROCESSES:-}" ]; then
  PROCESSES=$(PYTHONPATH=$repository python -m mnist_dist.distributed.gpu_count)
  [ "$PROCESSES" -gt 0 ] || PROCESSES=2
fi
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$PROCESSES: must be a number above 0; unset it for the default"

# Check the name, and that the port is free (on HEAD) or reachable (elsewhere); find the interface.
found=$(PYTHONPATH=$repository python -m mnist_dist.distributed.network "$head" "$port" "$node_rank")
read -r address interface <<<"$found" || true
[ -z "${INTERFACE:-}" ] || export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
[ -z "$interface" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}

# With torch 2.13, a node cannot join while the agents share their store with the processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# HEAD may know itself by another name or address than the others do.
if [ "$node_rank" = 0 ]; then endpoint=localhost:$port is_host=1; else endpoint=$head:$port is_host=0; fi

# Under nohup, torchrun must not handle SIGHUP: it is ignored then.
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2
[[ $(trap -p HUP) == "trap -- '' "* ]] || signals=$signals,SIGHUP

exec torchrun --nnodes="$hosts" --nproc_per_node="$PROCESSES" \
  --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="${RUN_ID:-$head-$port}" \
  --rdzv-conf="is_host=$is_host,last_call_timeout=5${RDZV_CONF:+,$RDZV_CONF}" ${address:+--local-addr="$address"} \
  --max-restarts="${MAX_RESTARTS:-3}" \
  --signals-to-handle="$signals" \
  "$repository/train_ddp.py" "$@"
