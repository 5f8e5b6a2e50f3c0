"""open_clip: safetensors and a JSON config that `open_clip.create_model_and_transforms('local-dir:OUT')` loads as is.

Letters: V vocabulary, W context, C text width, N heads, K width of a head, e channels added to each head, D embedding.
"""
import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax.data.tokenizers import Tokenizer
from lightclip_jax.errors import UserError
from lightclip_jax.export import hugging_face, verify
from lightclip_jax.export.towers import Towers
from lightclip_jax.inference.exported import optional
from lightclip_jax.models import convert, resnet, swin, vit

TORCH_PYTHON = 'LIGHTCLIP_TORCH_PYTHON'
RUNS_ON = ('open_clip', 'torch', 'timm')   # open_clip may be here alone, for ImageNet's names (docs/EVALUATION.md)
UNVERIFIED = (f'not verified: {", ".join(RUNS_ON)} are not all installed here, and {TORCH_PYTHON} names no interpreter with '
              'them (launch/parity_env.sh makes one)')
EPSILON = 1e-5   # of the text tower's LayerNorms
CLIP_BYTE_PAIRS = '67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8'   # SHA-256 of bpe_simple_vocab_16e6.txt
_MOBILENETS = {1.4: '140', 1.0: '100', 0.75: '075', 0.5: '050', 0.35: '035'}


def write(towers: Towers, folder: pathlib.Path) -> dict[str, Any]:
  """Writes `open_clip_model.safetensors`, `open_clip_config.json` and the tokenizer; returns what `model.json` says.

  Raises:
    UserError: for a tower that timm has no model for, or if safetensors is not installed.
  """
  model = towers.loaded.config.model
  name, arguments = timm_model(model.image)
  if arguments:   # timm reads them beside the weights, by an absolute path
    trunk = (folder / 'trunk').absolute()
    trunk.mkdir(exist_ok=True)
    (trunk / 'config.json').write_text(json.dumps({'architecture': name, 'model_args': arguments, 'pretrained_cfg': {}}))
    name = f'local-dir:{trunk}'
  weights, text = text_weights(towers)
  weights |= image_weights(towers)
  text |= tokenizer_config(towers.loaded.tokenizer, folder)
  optional('safetensors.numpy').save_file({k: np.asarray(v, order='C') for k, v in weights.items()},
                                          folder / 'open_clip_model.safetensors')
  vision = {'timm_model_name': name, 'timm_model_pretrained': False, 'timm_proj': 'linear', 'image_size': model.image.size,
            'timm_pool': 'token' if model.image.name == 'vit_ti' else 'avg'}
  config = {'model_cfg': {'embed_dim': model.embed_dim, 'custom_text': True, 'vision_cfg': vision, 'text_cfg': text},
            'preprocess_cfg': towers.loaded.preprocessing}
  (folder / 'open_clip_config.json').write_text(json.dumps(config, indent=2) + '\n')
  same = hugging_face.write(towers.loaded.tokenizer, model.text.context, folder)
  return {'format': 'open_clip', 'weights': 'open_clip_model.safetensors', 'hugging_face_tokenizer': same}


def move(folder: pathlib.Path, to: pathlib.Path) -> None:
  """Makes the absolute paths in the folder's config those that it will have as `to`."""
  was, will = (json.dumps(str(path.absolute()))[1:-1] for path in (folder, to))
  config = folder / 'open_clip_config.json'
  config.write_text(config.read_text().replace(was, will))


def timm_model(image: config_lib.ImageTower) -> tuple[str, dict[str, Any]]:
  """timm's name of a tower, and arguments where the name does not say all.

  Raises:
    UserError: if timm has no such model.
  """
  if image.stem_stride != 2:
    raise UserError(f'timm has no {image.name} with model.image.stem_stride={image.stem_stride}; export onnx or stablehlo')
  if image.name == 'mobilenet_v2':
    if image.width not in _MOBILENETS:
      raise UserError(f'timm has no MobileNetV2 of width {image.width}, only {", ".join(map(str, _MOBILENETS))}; '
                      'export onnx or stablehlo')
    return f'mobilenetv2_{_MOBILENETS[image.width]}', {}
  if image.name == 'resnet18':
    return 'resnet18', {} if image.width == 1 else {'channels': resnet.stage_channels(image.width)}
  size = {'img_size': image.size}
  if image.name == 'swin_nano':
    return 'swin_tiny_patch4_window7_224', {
      **size, 'embed_dim': swin.WIDTH, 'depths': swin.DEPTHS, 'num_heads': swin.HEADS, 'window_size': image.window,
      'patch_size': image.patch_size or swin.PATCH}
  patch = image.patch_size or vit.PATCH
  return 'vit_tiny_patch16_224', {} if (image.size, patch) == (224, 16) else {**size, 'patch_size': patch}


def image_weights(towers: Towers) -> dict[str, np.ndarray]:
  """The image tower and its projection by open_clip's names."""
  params, statistics = towers.params, towers.loaded.variables['batch_stats']
  trunk = convert.restore({'params': params['image'], 'batch_stats': statistics.get('image', {})},
                          convert.IMAGE_RULES[towers.loaded.config.model.image.name])
  return {'visual.head.proj.weight': params['image_projection']['kernel'].T, 'logit_scale': params['logit_scale'],
          **{f'visual.trunk.{name}': array for name, array in trunk.items()}}


def text_weights(towers: Towers) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The text tower by open_clip's names, and its config."""
  text, params = towers.loaded.config.model.text, towers.params
  weights = convert.restore({'params': params['text'], 'batch_stats': {}}, convert.OPEN_CLIP_TEXT)
  weights['text_projection'] = params['text_projection']['kernel']
  config = {'context_length': text.context, 'vocab_size': text.vocab_size, 'width': text.width, 'heads': text.heads,
            'layers': text.depth, 'pool_type': 'eos', 'eos_id': text.end_id, 'pad_id': towers.loaded.tokenizer.pad_id,
            'no_causal_mask': not text.causal}
  if not text.causal:
    weights, epsilon = ignore_padding(weights, text.heads, config['pad_id'])
    config |= {'width': weights['ln_final.weight'].shape[0], 'norm_kwargs': {'eps': epsilon}}
  return {f'text.{name}': array for name, array in weights.items()}, config


def tokenizer_config(tokenizer: Tokenizer, folder: pathlib.Path) -> dict[str, Any]:
  """What the text tower's config says about the tokenizer. CLIP's own is what open_clip takes where nothing is said."""
  if tokenizer.suffix != '.gz':
    return {'hf_tokenizer_name': 'tokenizer.json'}
  own = hashlib.sha256(gzip.decompress(tokenizer.to_bytes())).hexdigest() == CLIP_BYTE_PAIRS
  return {} if own else {'tokenizer_kwargs': {'bpe_path': str((folder / 'tokenizer.gz').absolute())}}


def ignore_padding(weights: dict[str, np.ndarray], heads: int, pad_id: int) -> tuple[dict[str, np.ndarray], float]:
  """The same tower with a few more channels, in which nothing attends to padding; and its LayerNorms' epsilon.

  open_clip's config has no mask for padding in a tower that looks both ways. So the padding token itself says what it
  is: in two new channels its embedding is +1000 and -1000, where all other tokens have 0. A new channel of each head's key
  reads this, and its query is always 1: the logit of padding is below -1000, and its softmax weight exactly 0.
  Everything that writes to the other channels is centred, which their LayerNorms do not see; so the mean stays 0, and
  the variance is the old one times C / C', which gains and epsilon make up for. Exact but for rounding.
  """
  width = weights['ln_final.weight'].shape[0]
  per_head = -(-2 // heads)
  wide, old, new = width + heads * per_head, width // heads, width // heads + per_head
  shrink = width / wide
  out = {}
  for name, array in weights.items():
    kind = name.split('.', 3)[-1] if name.startswith('transformer') else name
    if kind in ('token_embedding.weight', 'positional_embedding'):
      out[name] = _grown(array - array.mean(1, keepdims=True), (len(array), wide))
    elif kind in ('attn.in_proj_weight', 'attn.in_proj_bias'):
      out[name] = _heads(array, heads, old, new, wide)
    elif kind == 'attn.out_proj.weight':
      columns = (array - array.mean(0)).reshape(width, heads, old)
      out[name] = _grown(columns, (wide, heads, new)).reshape(wide, wide)
    elif kind == 'mlp.c_proj.weight':
      out[name] = _grown(array - array.mean(0), (wide, 4 * wide))
    elif kind in ('attn.out_proj.bias', 'mlp.c_proj.bias'):
      out[name] = _grown(array - array.mean(), (wide,))
    elif kind == 'mlp.c_fc.weight':
      out[name] = _grown(array, (4 * wide, wide))
    elif kind == 'mlp.c_fc.bias':
      out[name] = _grown(array, (4 * wide,))
    elif kind == 'text_projection':
      out[name] = _grown(array, (wide, array.shape[1]))
    else:   # LayerNorms
      gain = name.endswith('weight')
      out[name] = _grown(array * shrink ** 0.5 if gain else array, (wide,))
      out[name][width:] = gain
  out['token_embedding.weight'][pad_id] = 0
  out['token_embedding.weight'][pad_id, width:width + 2] = 1000, -1000
  return out, EPSILON * shrink


def _heads(array: np.ndarray, heads: int, old: int, new: int, wide: int) -> np.ndarray:
  """Weight [3·C, C] or bias [3·C] of queries, keys and values, wider, with the channel that tells padding."""
  parts = array.reshape(3, heads, old, -1)
  parts = _grown(parts, (3, heads, new, parts.shape[-1] if array.ndim == 1 else wide))
  parts[0] *= (new / old) ** 0.5   # the softmax divides by the root of a head's width
  if array.ndim == 1:
    parts[0, :, old] = 1
  else:
    parts[1, :, old, wide - heads * (new - old)] = -1000
  return parts.reshape(3 * wide, *((wide,) if array.ndim > 1 else ()))


def _grown(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  return np.pad(array, [(0, size - had) for size, had in zip(shape, array.shape, strict=True)]).astype(np.float32)


def embed(folder: pathlib.Path, inputs: verify.Inputs) -> dict[str, np.ndarray] | None:
  """Unit vectors [N, D] that real open_clip computes from the folder, by the inputs' names; None where no interpreter has it.
  Texts may be given as strings, for its own tokenizer; then its ids [N, W] are there too, as 'ids/' and their name.

  Raises:
    UserError: if open_clip cannot load the folder.
  """
  python = os.environ.get(TORCH_PYTHON) or (sys.executable if all(map(importlib.util.find_spec, RUNS_ON)) else None)
  if not python:
    return None
  with tempfile.TemporaryDirectory() as scratch:
    files = [os.path.join(scratch, name) for name in ('in.npz', 'out.npz')]
    np.savez(files[0], **inputs)
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([python, '-I', pathlib.Path(__file__).with_name('open_clip_side.py'), folder, *files],
                          env=environment, capture_output=True, text=True)
    if done.returncode:
      said = done.stderr.strip().splitlines() or [f'{python} ended with exit code {done.returncode} and said nothing']
      raise UserError(f'open_clip cannot load {str(folder)!r}: {said[-1]}')
    return dict(np.load(files[1]))
