#!/usr/bin/env bash
# An environment with PyTorch, timm and open_clip, for the parity tests:
#   launch/parity_env.sh DIR && LIGHTCLIP_TORCH_PYTHON=DIR/bin/python launch/test.sh tests/models/test_parity.py -m slow -s
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
[ -x "$1/bin/python" ] || python3 -m venv "$1"
"$1/bin/pip" install torch==2.13.0 numpy huggingface_hub safetensors pyyaml ftfy regex tqdm pillow transformers
"$1/bin/pip" install --no-deps timm open_clip_torch torchvision   # torchvision's compiled operators are not needed
