#!/usr/bin/env bash
# Export with one or several machines: run this on each of them. Arguments go to dist_export.
#   one machine:   NPROC_PER_NODE=4 launch/torchrun.sh --config export.yaml
#   two machines:  NNODES=2 NODE_RANK=<0 or 1> MASTER_ADDR=<machine 0> NPROC_PER_NODE=4 launch/torchrun.sh --config export.yaml
# Settings, by environment. Kubeflow's operators set the PET_ names, which torchrun knows too:
#   NNODES (PET_NNODES)                  machines; 1
#   NODE_RANK (PET_NODE_RANK)            number of this machine, from 0; 0
#   NPROC_PER_NODE (PET_NPROC_PER_NODE)  ranks of a machine; 1. "auto" is torchrun's, which takes one a core without a GPU
#   MASTER_ADDR (PET_MASTER_ADDR)        name or address of machine 0, as the others reach it
#   MASTER_PORT (PET_MASTER_PORT)        a port there that is free; 29400
#   JOB_ID           the same on all machines, another one for each job; "dist_export"
#   MAX_RESTARTS     so often torchrun starts all ranks anew before it gives up; 0. A restart resumes
#   LOCAL_ADDR, GLOO_SOCKET_IFNAME       address and interface of this machine that the others reach; found by themselves
#   PYTHON           the interpreter; python
#   ENTRY            what every rank runs; "-m dist_export". A training script that ends with an export is started alike
# Ends with 0 where the package is committed, else with another number: torchrun makes 1 of every failure, also of a mistake
# in the settings (2); the line that begins with "dist_export:" says which it was.
set -euo pipefail

nnodes=${NNODES:-${PET_NNODES:-1}}
node_rank=${NODE_RANK:-${PET_NODE_RANK:-0}}
nproc=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-1}}
master=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
port=${MASTER_PORT:-${PET_MASTER_PORT:-29400}}
python=${PYTHON:-python}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  echo "torchrun.sh: $*" >&2
  exit 2
}
for setting in "NNODES=$nnodes" "NPROC_PER_NODE=$nproc" "NODE_RANK=$node_rank" "MASTER_PORT=$port"; do
  value=${setting#*=}
  [[ $value =~ ^[0-9]+$ || $setting == NPROC_PER_NODE=auto ]] || fail "${setting%%=*} is '$value'; a number is needed"
done
((nnodes >= 1)) || fail "NNODES is $nnodes; at least one machine is needed"
((node_rank < nnodes)) || fail "NODE_RANK is $node_rank, but the machines count from 0 to $((nnodes - 1)) (NNODES=$nnodes)"

launcher=("$python" -m torch.distributed.run --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}")
if ((nnodes == 1)); then
  launcher+=(--standalone)
else
  [[ -n $master ]] || fail "NNODES is $nnodes, so MASTER_ADDR must say where machine 0 is reached"
  if [[ -z ${LOCAL_ADDR:-} || -z ${GLOO_SOCKET_IFNAME:-} ]]; then
    found=$("$python" "$here/find_address.py" "$master" "$node_rank")
    LOCAL_ADDR=${LOCAL_ADDR:-${found% *}}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-${found#* }}
  fi
  # without is_host torchrun guesses by name who hosts the store; without the addresses ranks are told 127.0.0.1
  launcher+=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-id "${JOB_ID:-dist_export}" --rdzv-endpoint "$master:$port")
  launcher+=(--rdzv-conf "is_host=$((node_rank == 0 ? 1 : 0))" --local-addr "$LOCAL_ADDR")
fi
# what stands in the environment for this script would be read once more by torchrun, or mislead it
unset NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT
unset PET_NNODES PET_NODE_RANK PET_NPROC_PER_NODE PET_MASTER_ADDR PET_MASTER_PORT
unset RANK WORLD_SIZE # of the operator: those of a machine, not of a rank
ulimit -Sn "$(ulimit -Hn)" # gloo joins every rank with every other, twice: two sockets for each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun would, without a warning

# exec: SIGTERM then reaches torchrun once. Sent to this script and sent on by it, as where a scheduler signals all
# processes, it would come twice, and torchrun would break off while it waits for its ranks
# shellcheck disable=SC2086 # ENTRY is words
exec "${launcher[@]}" ${ENTRY:--m dist_export} "$@"
