#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes it, copies the code, installs, runs on all hosts, streams the log, starts again
# after a preemption, and deletes it. Ctrl-C (or TERM): the run is told to save, and the slice deleted as at the end.
#   launch/tpu_pod.sh --name=clip --zone=us-central1-a --type=v5litepod-256 --spot --nfs=10.0.0.2:/share -- \
#     --config=configs/mbv2.py:yfcc15m --workdir=/mnt/share/run --config.data.dataset=/mnt/share/yfcc15m
# --nfs=HOST:/PATH  a disk (Filestore) that every host mounts at /mnt/share
# --project=ID      another project than gcloud's own
# --runtime=NAME    of the TPU VM (default: by type)
# --existing        a TPU VM that is there already; it is not deleted
# --spot            cheaper, and may be taken away at any time
# --keep            do not delete the slice at the end
# --attempts=N      how often to start again (default 100)
# --dry-run         print every command, run none
set -euo pipefail
PYTHON_VERSION=3.12   # the hosts' own is 3.10, which JAX has left behind

fail() { echo "error: $1" >&2; exit 2; }
name='' zone='' type='' project='' runtime='' nfs='' existing=false spot=false keep=false dry=false attempts=100
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --attempts=*) attempts=${1#*=} ;;
    --existing) existing=true ;;
    --spot) spot=true ;;
    --keep) keep=true ;;
    --dry-run) dry=true ;;
    --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'; flags of main come after --" ;;
  esac
  shift
done
[ -n "$name" ] || fail '--name=NAME is missing'
[ -n "$zone" ] || fail '--zone=ZONE is missing'
$existing || [ -n "$type" ] || fail '--type=TYPE is missing, such as v5litepod-256 (or give --existing)'
[ $# -gt 0 ] || fail 'the flags of main are missing, after --'
case ${runtime:-$type} in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v4-*) runtime=tpu-ubuntu2204-base ;;
esac
where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run() {
  if $dry; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }
state() { gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>/dev/null || echo GONE; }

create() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  $spot && options+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
  $dry && return
  local now
  while now=$(state); [ "$now" != ACTIVE ]; do
    case $now in FAILED | SUSPENDED | SUSPENDING | GONE) echo "the request for $name is $now" >&2; return 1 ;; esac
    echo "waiting for $name: $now"
    sleep "${POLL_SECONDS:-30}"
  done
}
ready() { $existing || { ! $dry && [ "$(state)" = ACTIVE ]; } || create; }
delete() { run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }
install() {
  local archive=${TMPDIR:-/tmp}/lightclip_jax.$$.tar.gz
  run tar -czf "$archive" -C "$root" --exclude=.git --exclude=.venv --exclude=runs . &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:lightclip_jax.tar.gz" "${where[@]}" --worker=all &&
    run rm -f "$archive" &&
    on_all "mkdir -p lightclip_jax && tar -xzf lightclip_jax.tar.gz -C lightclip_jax && cd lightclip_jax && \
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && python3 -m uv python install --quiet $PYTHON_VERSION && \
PYTHON=\$(python3 -m uv python find --system $PYTHON_VERSION) ACCELERATOR=tpu bash launch/setup.sh && \
.venv/bin/python -m pip install --quiet gcsfs" &&
    { [ -z "$nfs" ] || on_all "mountpoint -q /mnt/share || { sudo apt-get install -yq nfs-common && sudo mkdir -p /mnt/share && \
sudo mount $(printf %q "$nfs") /mnt/share && sudo chmod a+rwx /mnt/share; }"; }
}
train() { on_all "cd lightclip_jax && exec .venv/bin/python -m lightclip_jax.main $(printf '%q ' "$@")"; }

finish() { $existing || $keep || delete; }
# The run outlives gcloud, and the slice, which costs money, this script.
training=''
# shellcheck disable=SC2329   # the trap calls it
interrupted() {
  trap - INT TERM HUP
  local end=deleted
  ! $existing && ! $keep || end=kept
  echo "stopping: the run saves, for 3 minutes at most, then $name is $end; the same again ends at once" >&2 || true
  [ -z "$training" ] || on_all "pkill -TERM -f '[l]ightclip_jax.main'; \
timeout 180 bash -c 'while pgrep -f [l]ightclip_jax.main; do sleep 1; done' >/dev/null" || true
  finish || true
  exit 130
}
trap interrupted INT TERM HUP

code=1
for ((attempt = 1; attempt <= attempts; attempt++)); do
  if ready && install; then
    train "$@" & training=$!   # bash hears signals while it waits, but not before a command in the foreground has ended
    wait "$training" && code=0 || code=$?
    training=''
    case $code in 0 | 2) break ;; esac   # 2: a mistake, which another attempt would only repeat
  fi
  echo "attempt $attempt ended with $code; starting again where the last checkpoint is" >&2
  $existing || [ "$(state)" = ACTIVE ] || delete || true
  sleep "${POLL_SECONDS:-30}"
done
finish
exit "$code"
