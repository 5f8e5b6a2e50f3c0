"""Weights by timm's and open_clip's names -> our trees, and back. numpy in, dict out; PyTorch is not needed.

Letters: O output channels, I input channels, k kernel side.
"""
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lightclip_jax.errors import UserError

# (regular expression of the whole name, our path). A name that no line matches is an error; an empty path drops it.
Rules = Sequence[tuple[str, str]]

_BLOCK: Rules = (   # timm's Transformer blocks
    (r'(.*)norm1\.(\w+)', r'\1attention_norm/\2'), (r'(.*)norm2\.(\w+)', r'\1mlp_norm/\2'),
    (r'(.*)mlp\.fc1\.(\w+)', r'\1mlp/hidden/\2'), (r'(.*)mlp\.fc2\.(\w+)', r'\1mlp/out/\2'),
    (r'(.*)attn\.qkv\.(\w+)', r'\1attention/qkv/\2'), (r'(.*)attn\.proj\.(\w+)', r'\1attention/out/\2'),
)
_NOT_FEATURES = ((r'(classifier|fc|head)\..*', ''), (r'.*num_batches_tracked', ''))
MOBILENET_V2: Rules = (
    *_NOT_FEATURES, (r'conv_stem\.weight', r'stem/weight'), (r'bn1\.(\w+)', r'stem_norm/\1'),
    (r'conv_head\.weight', r'head/weight'), (r'bn2\.(\w+)', r'head_norm/\1'),
    (r'blocks\.0\.0\.conv_dw\.weight', r'block0_0/depthwise/weight'),
    (r'blocks\.0\.0\.bn1\.(\w+)', r'block0_0/depthwise_norm/\1'),
    (r'blocks\.0\.0\.conv_pw\.weight', r'block0_0/project/weight'),
    (r'blocks\.0\.0\.bn2\.(\w+)', r'block0_0/project_norm/\1'),
    (r'blocks\.(\d)\.(\d)\.conv_pw\.weight', r'block\1_\2/expand/weight'),
    (r'blocks\.(\d)\.(\d)\.bn1\.(\w+)', r'block\1_\2/expand_norm/\3'),
    (r'blocks\.(\d)\.(\d)\.conv_dw\.weight', r'block\1_\2/depthwise/weight'),
    (r'blocks\.(\d)\.(\d)\.bn2\.(\w+)', r'block\1_\2/depthwise_norm/\3'),
    (r'blocks\.(\d)\.(\d)\.conv_pwl\.weight', r'block\1_\2/project/weight'),
    (r'blocks\.(\d)\.(\d)\.bn3\.(\w+)', r'block\1_\2/project_norm/\3'),
)
RESNET18: Rules = (
    *_NOT_FEATURES, (r'conv1\.weight', r'stem/weight'), (r'bn1\.(\w+)', r'stem_norm/\1'),
    (r'layer1\.(\d)\.', r'block0_\1/'), (r'layer2\.(\d)\.', r'block1_\1/'), (r'layer3\.(\d)\.', r'block2_\1/'),
    (r'layer4\.(\d)\.', r'block3_\1/'), (r'(.*/)conv(\d)\.weight', r'\1conv\2/weight'),
    (r'(.*/)bn(\d)\.(\w+)', r'\1norm\2/\3'), (r'(.*/)downsample\.0\.weight', r'\1shortcut/weight'),
    (r'(.*/)downsample\.1\.(\w+)', r'\1shortcut_norm/\2'),
)
VIT: Rules = (
    *_NOT_FEATURES, (r'cls_token', 'class_token'), (r'pos_embed', 'position_embedding'),
    (r'patch_embed\.proj\.(\w+)', r'patch_embedding/\1'), (r'norm\.(\w+)', r'final_norm/\1'),
    (r'blocks\.(\d+)\.', r'block\1/'), *_BLOCK,
)
SWIN: Rules = (
    *_NOT_FEATURES, (r'.*(relative_position_index|attn_mask)', ''),
    (r'patch_embed\.proj\.(\w+)', r'patch_embedding/\1'),
    (r'patch_embed\.norm\.(\w+)', r'patch_norm/\1'), (r'norm\.(\w+)', r'final_norm/\1'),
    (r'layers\.(\d)\.downsample\.norm\.(\w+)', r'merge\1/norm/\2'),
    (r'layers\.(\d)\.downsample\.reduction\.weight', r'merge\1/reduce/weight'),
    (r'layers\.(\d)\.blocks\.(\d)\.', r'block\1_\2/'),
    (r'(.*)attn\.relative_position_bias_table', r'\1window/relative_position_bias'),
    (r'(.*)attn\.(qkv|proj)\.', r'\1window/attn.\2.'), *_BLOCK,
)
OPEN_CLIP_TEXT: Rules = (
    (r'(visual\.|logit_scale|logit_bias|text_projection|attn_mask).*', ''),
    (r'token_embedding\.weight', r'token_embedding/embedding'), (r'positional_embedding', 'position_embedding'),
    (r'ln_final\.(\w+)', r'final_norm/\1'), (r'transformer\.resblocks\.(\d+)\.', r'block\1/'),
    (r'(.*)ln_1\.(\w+)', r'\1attention_norm/\2'), (r'(.*)ln_2\.(\w+)', r'\1mlp_norm/\2'),
    (r'(.*)attn\.in_proj_(\w+)', r'\1attention/qkv/\2'), (r'(.*)attn\.out_proj\.(\w+)', r'\1attention/out/\2'),
    (r'(.*)mlp\.c_fc\.(\w+)', r'\1mlp/hidden/\2'), (r'(.*)mlp\.c_proj\.(\w+)', r'\1mlp/out/\2'),
)
IMAGE_RULES = {'mobilenet_v2': MOBILENET_V2, 'resnet18': RESNET18, 'swin_nano': SWIN, 'vit_ti': VIT}
_LEAVES = {'running_mean': 'mean', 'running_var': 'var'}


def convert(weights: Mapping[str, np.ndarray], rules: Rules) -> dict[str, Any]:
  """{'params', 'batch_stats'} of one tower.

  Args:
    weights: arrays by PyTorch name; convolutions [O, I, k, k] become [k, k, I, O], linear maps [O, I] become [I, O].
    rules: tried in order, each on what the ones before made of the name.

  Raises:
    UserError: for a name that no rule matches.
  """
  out: dict[str, Any] = {'params': {}, 'batch_stats': {}}
  for name, array in weights.items():
    path = _path(name, rules)
    if path:
      *parents, leaf = path.split('/')
      leaf = _LEAVES.get(leaf, leaf)
      tree = out['batch_stats' if leaf in _LEAVES.values() else 'params']
      for parent in parents:
        tree = tree.setdefault(parent, {})
      leaf = leaf if leaf != 'weight' else 'scale' if array.ndim == 1 else 'kernel'
      tree[leaf] = _transposed(array) if leaf == 'kernel' else array
  return out


def restore(variables: Mapping[str, Any], rules: Rules) -> dict[str, np.ndarray]:
  """The inverse of `convert`: one tower's arrays by PyTorch name, for export.

  Raises:
    UserError: for a variable that no rule gives a name.
  """
  out = {}
  for collection in ('params', 'batch_stats'):
    for path, array in _leaves(variables.get(collection, {})):
      *parents, leaf = path
      name = {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)
      name = {ours: theirs for theirs, ours in _LEAVES.items()}[leaf] if collection == 'batch_stats' else name
      out[_name('/'.join([*parents, name]), rules)] = _restored(array) if leaf == 'kernel' else array
  return out


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, name))
    else:
      yield (*path, name), np.asarray(value)


def _name(path: str, rules: Rules) -> str:
  """The PyTorch name that the rules turn into this path: each rule is tried backwards, and its answer forwards."""
  for i, (pattern, replacement) in enumerate(rules):
    if not replacement or replacement.endswith(('/', '.')):
      continue
    backwards, template = _reversed(pattern, replacement)
    if match := re.fullmatch(backwards, path):
      name = match.expand(template)
      for prefix in reversed(rules[:i]):
        if prefix[1].endswith(('/', '.')):
          backwards, template = _reversed(*prefix)
          name = re.sub(f'^{backwards}', template, name)
      if _path(name, rules) == path:
        return name
  raise UserError(f'no rule for the variable {path!r}; is it of another tower?')


def _reversed(pattern: str, replacement: str) -> tuple[str, str]:
  """The rule that undoes this one. Groups stand in the same order on both sides."""
  groups = re.findall(r'\([^)]*\)', pattern)
  parts = re.split(r'\\(\d)', replacement)
  backwards = ''.join(groups[int(part) - 1] if i % 2 else re.escape(part) for i, part in enumerate(parts))
  numbers = iter(range(1, len(groups) + 1))
  template = re.sub(r'\([^)]*\)', lambda _: f'\\{next(numbers)}', pattern)
  return backwards, template.replace('\\.', '.')


def _restored(array: np.ndarray) -> np.ndarray:
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _path(name: str, rules: Rules) -> str:
  path = name
  for pattern, replacement in rules:
    if replacement.endswith(('/', '.')):   # a prefix; later rules see the rest
      path = re.sub(f'^{pattern}', replacement, path)
    elif re.fullmatch(pattern, path):
      return re.sub(f'^{pattern}$', replacement, path)
  raise UserError(f'no rule for the weight {name!r}; is it a state dict of another tower?')


def _transposed(array: np.ndarray) -> np.ndarray:
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
