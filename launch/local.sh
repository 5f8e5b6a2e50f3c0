#!/usr/bin/env bash
# Makes .venv, installs, trains. Without flags: the quick start (MobileNetV2 on the built-in emoji set, CPU, minutes).
#   launch/local.sh
#   launch/local.sh --config=configs/rn18.py:quickstart --workdir=runs/rn18
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ $# -gt 0 ] || set -- --config=configs/mbv2.py:quickstart --workdir=runs/quickstart
exec launch/memory.sh .venv/bin/python -m lightclip_jax.main "$@"
