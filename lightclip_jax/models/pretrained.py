"""Towers that start from weights of others (timm, torchvision, open_clip) or from our own checkpoints.

Letters: W text positions, C channels, N heads, n side of a grid.
"""
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from lightclip_jax.errors import UserError
from lightclip_jax.models import convert, mobilenet_v2, weight_files

Variables = dict[str, Any]   # {'params', 'batch_stats'}


@dataclasses.dataclass
class Report:
  """What became of every tensor: paths of ours in the first three, names of theirs in `unused`."""
  matched: list[str] = dataclasses.field(default_factory=list)
  resized: list[str] = dataclasses.field(default_factory=list)   # 'path (16, 3) -> (49, 3)'
  skipped: list[str] = dataclasses.field(default_factory=list)   # the file has it, but in a shape that the policy leaves out
  missing: list[str] = dataclasses.field(default_factory=list)   # the file does not have it: it keeps its random start
  unused: list[str] = dataclasses.field(default_factory=list)

  def lines(self) -> list[str]:
    """One line a list that is not empty."""
    named = [(kind, getattr(self, kind)) for kind in ('resized', 'skipped', 'missing', 'unused') if getattr(self, kind)]
    return [f'{len(self.matched)} tensors matched', *(f'{len(names)} {kind}: {", ".join(names)}' for kind, names in named)]


def image_tower(file: str | pathlib.Path, variables: Variables, name: str) -> tuple[Variables, Report]:
  """New variables whose `image` tower (and projection, where a file of open_clip has one that fits) comes from a file.

  Args:
    file: safetensors or .pth by the names of timm, torchvision (MobileNetV2, ResNet-18) or open_clip with a timm trunk.
    variables: the whole model's, as numpy or JAX arrays.
    name: the tower's, as in `config.ImageTower`.

  Raises:
    UserError: for a file that cannot be read, is of another tower, or has a shape that neither fits nor can be resized.
  """
  weights = weight_files.read(file)
  if any(key.startswith('visual.') for key in weights):
    trunk = {key.removeprefix('visual.trunk.'): array for key, array in weights.items() if key.startswith('visual.trunk.')}
    projection = weights.get('visual.head.proj.weight')
  else:
    trunk, projection = weights, None
  if name == 'mobilenet_v2' and any(key.startswith('features.') for key in trunk):
    trunk = _from_torchvision(trunk)
  return _place(file, variables, 'image', convert.convert(trunk, convert.IMAGE_RULES[name]),
                None if projection is None else projection.T)


def text_tower(file: str | pathlib.Path, variables: Variables, vocabulary: str = 'error') -> tuple[Variables, Report]:
  """New variables whose `text` tower (and projection, where it fits) comes from a file by open_clip's names.

  Args:
    vocabulary: what happens when the file's token embedding has another number of rows: 'error'; 'skip' (ours stays
      random: the file's tokenizer was another); 'rows' (the rows that both have; for a vocabulary that was extended).

  Raises:
    UserError: as for `image_tower`.
  """
  weights = weight_files.read(file)
  if any(key.startswith('text.') for key in weights):   # open_clip with custom_text
    weights = {key.removeprefix('text.'): array for key, array in weights.items() if key.startswith('text.')}
  converted = convert.convert(weights, convert.OPEN_CLIP_TEXT)
  return _place(file, variables, 'text', converted, weights.get('text_projection'), vocabulary)


def restore_partially(source: Variables, variables: Variables, pattern: str,
                      vocabulary: str = 'error') -> tuple[Variables, Report]:
  """New variables: those of `source` (one of our own checkpoints) whose path matches the regular expression.

  Args:
    pattern: of the paths of parameters; BatchNorm's running statistics go with the parameters beside them, without which a
      frozen tower would be another one.
    vocabulary: as for `text_tower`; the masked-language-model head's bias goes with the token embedding.

  Raises:
    UserError: if the pattern is no regular expression, nothing matches, or a shape does not fit.
  """
  try:
    expression = re.compile(pattern)
  except re.error as error:
    raise UserError(f'config.init.checkpoint_pattern {pattern!r} is no regular expression: {error}') from error
  def wanted(path: str) -> bool:
    return bool(expression.search(path) or expression.search(path.replace('batch_stats/', 'params/', 1)))

  report, flat, theirs = Report(), _flatten(variables), _flatten(source)
  try:
    for path, array in theirs.items():
      if wanted(path) and path not in flat:
        report.unused.append(path)
      elif wanted(path):
        flat[path] = _fitted(path, array, flat[path], report, vocabulary)
  except UserError as error:
    raise UserError(f'the checkpoint does not fit: {error}; config.init.checkpoint_pattern can leave it out') from error
  if not report.matched + report.resized:
    raise UserError(f'no parameter of the checkpoint matches {pattern!r}; they are named like {next(iter(theirs))!r}')
  report.missing = [path for path in flat if wanted(path) and path not in theirs]
  return _unflatten(flat), report


def _place(file: Any, variables: Variables, tower: str, converted: Variables, projection: np.ndarray | None,
           vocabulary: str = 'error') -> tuple[Variables, Report]:
  report, flat = Report(), _flatten(variables)
  theirs = {path.replace('/', f'/{tower}/', 1): array for path, array in _flatten(converted).items()}
  kernel = f'params/{tower}_projection/kernel'
  if projection is not None and projection.shape == flat[kernel].shape:
    theirs[kernel] = projection
  try:
    for path, array in theirs.items():
      if path in flat:
        flat[path] = _fitted(path, array, flat[path], report, vocabulary)
      else:
        report.unused.append(path)
  except UserError as error:
    raise UserError(f'{str(file)!r} does not fit: {error}') from error
  report.missing = [path for path in flat if path.split('/')[1] in (tower, f'{tower}_projection') and path not in theirs]
  if not report.matched:
    raise UserError(f'{str(file)!r} has no tensor of this {tower} tower')
  return _unflatten(flat), report


def _fitted(path: str, array: np.ndarray, ours: Any, report: Report, vocabulary: str) -> Any:
  """The array in our shape; `report` is told."""
  shape, array = tuple(ours.shape), np.asarray(array, np.float32)
  if array.shape == shape:
    report.matched.append(path)
    return array
  note = f'{path} {array.shape} -> {shape}'
  of_words = bool(re.search(r'(token_embedding/embedding|masked_lm/bias)$', path))
  if of_words and array.shape[1:] == shape[1:] and vocabulary != 'error':
    if vocabulary == 'skip':
      report.skipped.append(note)
      return ours
    rows = min(len(array), shape[0])
    report.resized.append(note)
    return np.concatenate([array[:rows], np.asarray(ours)[rows:]])
  of_places = bool(re.search(r'(position_embedding|relative_position_bias)$', path))
  if of_places and array.shape[-1] == shape[-1] and array.ndim == len(shape):
    of_text = '/text/' in path
    if of_text or _side(array.shape[-2] - (array.ndim - 2)):
      report.resized.append(note)
      return (_resized_line if of_text else _resized_grid)(array, shape)
  hint = ("; the policy 'skip' or 'rows' of config.init.vocabulary allows it" if of_words else
          '; only a square grid, behind a class token where ours is, can be resized' if of_places else '')
  raise UserError(f'{path} has shape {array.shape}, the model needs {shape}{hint}')


def _resized_line(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Positions of texts [W, C], interpolated."""
  return cv2.resize(array, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def _resized_grid(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Positions interpolated over a square grid: [1, 1 + n², C] behind a class token, or [n², N]."""
  first = array.ndim - 2   # the class token, where there is one
  grid, side = array.reshape(-1, shape[-1])[first:], _side(shape[-2] - first)
  square = grid.reshape(_side(len(grid)), -1, shape[-1])
  channels = [cv2.resize(square[..., c], (side, side), interpolation=cv2.INTER_CUBIC) for c in range(shape[-1])]
  out = np.stack(channels, axis=-1).reshape(-1, shape[-1])
  return np.concatenate([array.reshape(-1, shape[-1])[:first], out]).reshape(shape)


def _side(count: int) -> int:
  """The side of a square of so many cells; 0 if it is none."""
  side = round(count ** 0.5)
  return side if side * side == count else 0


def _from_torchvision(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """torchvision's names of a MobileNetV2 as timm's."""
  names = {'features.0.0': 'conv_stem', 'features.0.1': 'bn1', 'features.18.0': 'conv_head', 'features.18.1': 'bn2'}
  blocks = [(s, b) for s, (_, _, count, _) in enumerate(mobilenet_v2.STAGES) for b in range(count)]
  for i, (s, b) in enumerate(blocks, start=1):
    theirs = ('conv.0.0', 'conv.0.1', 'conv.1', 'conv.2') if i == 1 else ('conv.0.0', 'conv.0.1', 'conv.1.0', 'conv.1.1',
                                                                         'conv.2', 'conv.3')
    ours = ('conv_dw', 'bn1', 'conv_pw', 'bn2') if i == 1 else ('conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3')
    names |= {f'features.{i}.{a}': f'blocks.{s}.{b}.{c}' for a, c in zip(theirs, ours, strict=True)}
  out = {}
  for key, array in weights.items():
    module, _, leaf = key.rpartition('.')
    out[f'{names.get(module, module)}.{leaf}'] = array
  return out


def _flatten(tree: Mapping[str, Any], path: str = '') -> dict[str, Any]:
  out = {}
  for name, value in tree.items():
    inner = f'{path}/{name}' if path else name
    out |= _flatten(value, inner) if isinstance(value, Mapping) else {inner: value}
  return out


def _unflatten(flat: Mapping[str, Any]) -> Variables:
  out: Variables = {'params': {}, 'batch_stats': {}}
  for path, value in flat.items():
    *parents, leaf = path.split('/')
    tree = out
    for parent in parents:
      tree = tree.setdefault(parent, {})
    tree[leaf] = value
  return out
