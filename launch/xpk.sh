#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, by xpk (pip install xpk).
#
#   launch/xpk.sh [--dry-run] run VERB --flags... | list | logs | stop
#
# --dry-run prints the commands and runs none. Settings are environment variables:
#   CLUSTER  the GKE cluster, needed        NAME    of the workload, default bertjax
#   TYPE     default v5litepod-16           SLICES  default 1; more add data parallelism
#   ZONE     default us-central1-a          PROJECT default gcloud's
#   GRACE    seconds from SIGTERM to SIGKILL, in which a checkpoint is saved, default 600
set -euo pipefail

name=${NAME:-bertjax}
cluster=(--cluster="${CLUSTER:?set CLUSTER to the name of the GKE cluster}")
cluster+=(--zone="${ZONE:-us-central1-a}" ${PROJECT:+--project="$PROJECT"})

dry=
for argument; do
  shift
  if [[ $argument == --dry-run ]]; then dry=1; else set -- "$@" "$argument"; fi
done
call() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [[ $dry ]] || "$@"
}

verb=${1:-help}
shift || true
case $verb in
  run) # the checkout goes into the image; 75, a save after SIGTERM, or a crash starts it again
    printf -v flags ' %q' "$@"
    call xpk workload create "${cluster[@]}" --workload="$name" \
      --tpu-type="${TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}" \
      --base-docker-image=python:3.12 --script-dir="$(cd "$(dirname "$0")/.." && pwd)" \
      --max-restarts=100 --restart-on-exit-codes=1,75 \
      --termination-grace-period-seconds="${GRACE:-600}" \
      --command="pip install -q -e '.[tpu]' && exec bertjax$flags"
    ;;
  list) call xpk workload list "${cluster[@]}" ;;
  logs) # of every pod; kubectl follows at most five by default
    call kubectl logs -f --prefix --tail=50 --max-log-requests=10000 \
      -l "jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  stop) call xpk workload delete "${cluster[@]}" --workload="$name" ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
