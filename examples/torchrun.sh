#!/usr/bin/env bash
# Train on every GPU of one or several nodes; run the same line on each of them.
#
#   examples/torchrun.sh flux-dev-hps run.dir=runs/first run.sharding=fsdp
#   NODES=4 RENDEZVOUS=first-node:29500 examples/torchrun.sh flux-dev-hps run.dir=/shared/first run.sharding=fsdp
#
# NODES       how many nodes (default 1)
# GPUS        processes on this node (default: its GPUs)
# RENDEZVOUS  host:port on one of the nodes that all of them reach (default: this one, any free port)
# JOB         name of the job, should several use one rendezvous (default srpo)
# PYTHON      interpreter (default python)
#
# SIGTERM, SIGINT and SIGUSR1 go to the ranks, which save and end. torchrun would not live through SIGUSR1, and after
# the others give ranks half a minute to save. Nor does it pass on their exit status: after SIGUSR1 this script's is 75,
# "start me again with --resume", whatever torchrun's is but 0.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: $0 RECIPE [section.key=value ...] [--resume]" >&2; exit 2; }

setsid "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${GPUS:-$(nvidia-smi --list-gpus | wc -l)}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" \
    --rdzv-id "${JOB:-srpo}" \
    -m srpo train "$@" &
launcher=$!

again=false
pass_on() {
    # shellcheck disable=SC2046  # several numbers
    kill -s "$1" $(cat "/proc/$launcher"/task/*/children 2>/dev/null) 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'again=true; pass_on USR1' USR1

while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done # a trap ends a wait, not the launcher
status=0
wait "$launcher" || status=$?
[[ $again == true && $status -ne 0 ]] && status=75
exit "$status"
