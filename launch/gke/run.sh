#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster with the JobSet controller; applies jobset.yaml.j2 and follows process 0's log.
# Dockerfile, beside it, makes the image.
#   launch/gke/run.sh --name=clip --image=REGION-docker.pkg.dev/PROJECT/REPO/lightclip --accelerator=tpu-v5-lite-podslice \
#     --topology=16x16 --claim=share -- --config=configs/mbv2.py:yfcc15m --workdir=/mnt/share/run \
#     --config.data.dataset=/mnt/share/yfcc15m
# --chips=N            chips a host (default 4)         --namespace=NAME     (default: default)
# --restarts=N         after failures (default 100)     --claim=NAME         a ReadWriteMany volume claim, at /mnt/share
# --spot               on spot nodes                    --service-account=NAME
# --delete             delete the JobSet of this name   --dry-run            print the YAML and every command, run none
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
dry=false delete=false name='' namespace=default options=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=true ;;
    --delete) delete=true ;;
    --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --name=*) name=${1#*=} options+=("$1") ;;
    --namespace=*) namespace=${1#*=} options+=("$1") ;;
    --) break ;;
    *) options+=("$1") ;;
  esac
  shift
done
run() {
  if $dry; then printf '%q ' "$@"; echo; else "$@"; fi
}
if $delete; then
  [ -n "$name" ] || { echo 'error: --name=NAME is missing' >&2; exit 2; }
  run kubectl delete jobset "$name" --namespace="$namespace"
  exit
fi
yaml=$("$python" "$here/render.py" "${options[@]}" "$@")
if $dry; then printf '%s\n' "$yaml"; fi
run kubectl apply --filename=- <<<"$yaml"
first=(--namespace="$namespace" --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0")
left=30
until run kubectl get pod "${first[@]}" --output=name | grep .; do   # `wait` fails at once where no pod is made yet
  ((left--)) || { echo "error: $name gets no pods; see kubectl describe jobset $name --namespace=$namespace" >&2; exit 1; }
  sleep "${POLL_SECONDS:-10}"
done
run kubectl wait --for=condition=Ready pod "${first[@]}" --timeout=24h
run kubectl logs --follow "${first[@]}"
