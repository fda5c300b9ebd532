#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one host or a slice of many.
#
#   launch/tpu_vm.sh [--dry-run] create | setup | run VERB --flags... | logs | stop | delete
#
# --dry-run prints the commands and runs none. Settings are environment variables:
#   NAME  of the slice, default bertjax     ZONE     default us-central1-a
#   TYPE  default v5litepod-16              RUNTIME  default by TYPE
#   SPOT  1 = preemptible, cheaper          PROJECT  default gcloud's
set -euo pipefail

name=${NAME:-bertjax} zone=${ZONE:-us-central1-a} type=${TYPE:-v5litepod-16}
case $type in
  v6e-*) version=v2-alpha-tpuv6e ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  *) version=tpu-ubuntu2204-base ;;
esac
where=(--zone="$zone" ${PROJECT:+--project="$PROJECT"})

dry=
for argument; do
  shift
  if [[ $argument == --dry-run ]]; then dry=1; else set -- "$@" "$argument"; fi
done
call() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [[ $dry ]] || "$@"
}
tpu() { call gcloud compute tpus "$@" "${where[@]}"; }
on_all() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }

verb=${1:-help}
shift || true
case $verb in
  create) # waits in Google's queue; the node exists once `describe` says ACTIVE
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="${RUNTIME:-$version}" ${SPOT:+--spot}
    tpu queued-resources describe "$name" --format='value(state.state)'
    ;;
  setup) # the checkout as committed, and a separate Python: the image's may be older than 3.11
    if [[ $dry ]]; then folder=/tmp; else folder=$(mktemp -d); fi
    package=$folder/bertjax.tar.gz
    call git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$package" HEAD
    tpu tpu-vm scp "$package" "$name:bertjax.tar.gz" --worker=all
    on_all 'set -e; mkdir -p bertjax && tar xzf bertjax.tar.gz -C bertjax
      curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv venv --clear --python 3.12 venv
      ~/.local/bin/uv pip install --python venv/bin/python -e "bertjax[tpu]"'
    ;;
  run) # on every host, until it ends (0) or the flags are wrong (2); 75 is a save after SIGTERM
    printf -v flags ' %q' "$@"
    on_all "cat > run.sh <<'END'
{ rm -f stopped
until venv/bin/bertjax$flags; do
  code=\$?
  if [ \$code != 2 ] && [ ! -e stopped ]; then sleep 10; fi
  if [ \$code = 2 ] || [ -e stopped ]; then exit \$code; fi
done
exit; } # read completely before it starts, so that a new run may write this file
END
setsid nohup flock run.lock bash run.sh >> run.log 2>&1 < /dev/null &" # after the run before it
    ;;
  logs) tpu tpu-vm ssh "$name" --worker=0 --command='tail -n 50 -f run.log' ;;
  stop) # SIGTERM: every host saves the same step and ends
    on_all 'touch stopped; pkill -TERM -f '\''[v]env/bin/bertjax'\'' || true'
    ;;
  delete) tpu queued-resources delete "$name" --force --quiet ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
