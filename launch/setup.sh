# shellcheck shell=bash
# Sourced by the other scripts: makes .venv beside them and installs requirements.txt, once for each content of that file, with
# JAX for ACCELERATOR (cuda13, cuda12, tpu or cpu). By default that is what this machine has; a login node has none, so say it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

accelerator() {
  local driver capability
  IFS=', ' read -r driver capability < <(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null) || true
  capability=${capability/./}
  driver=${driver%%.*}
  if [[ $driver =~ ^[0-9]+$ && $capability =~ ^[0-9]+$ ]]; then   # what JAX says that CUDA 13 needs
    if [ "$driver" -ge 580 ] && [ "$capability" -ge 75 ]; then echo cuda13; else echo cuda12; fi
  elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then   # up to v4; v5e and later
    echo tpu
  else
    echo cpu
  fi
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  version='import platform; print("Python " + platform.python_version())'
  found=$("$python" -c "$version" 2>/dev/null || echo 'nothing that runs')
  echo "error: '$python' is $found; Python 3.11 or newer is needed (set PYTHON=…)" >&2
  exit 2
}
ACCELERATOR=${ACCELERATOR:-$(accelerator)}
case $ACCELERATOR in
  cuda12 | cuda13 | tpu | cpu) ;;
  *) echo "error: ACCELERATOR is '$ACCELERATOR'; it can be cuda13, cuda12, tpu or cpu" >&2; exit 2 ;;
esac
wanted=$("$python" -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())')
installed=$(cat .venv/installed 2>/dev/null || true)
# JAX for an accelerator runs on CPUs as well.
if [ "$installed" != "$wanted $ACCELERATOR" ] && ! { [ "$ACCELERATOR" = cpu ] && [ "${installed%% *}" = "$wanted" ]; }; then
  echo "installing into .venv, for $ACCELERATOR …"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "jax[$ACCELERATOR]"
  echo "$wanted $ACCELERATOR" > .venv/installed
fi
