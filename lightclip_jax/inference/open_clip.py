"""open_clip's folders (safetensors, `open_clip_config.json`, a tokenizer) as models: our own export, or one of others.

What the folder asks for and our towers do not do is refused by name, never left out.

Letters: b examples that a tower gets at a time, S image size, W text positions, F image feature, C text width, D embedding.
"""
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax import storage
from lightclip_jax.data import tokenizers
from lightclip_jax.errors import UserError
from lightclip_jax.models import convert, image_towers, norm, resnet, text_transformer, weight_files

CONFIG_FILE, WEIGHTS_FILE = 'open_clip_config.json', 'open_clip_model.safetensors'
TOKENIZER_FILES = ('tokenizer.model', 'tokenizer.gz', 'tokenizer.json')   # ours first
_WIDTHS = {'mobilenetv2_140': 1.4, 'mobilenetv2_100': 1.0, 'mobilenetv2_075': 0.75, 'mobilenetv2_050': 0.5,
           'mobilenetv2_035': 0.35}
_TRUNKS = {**dict.fromkeys(_WIDTHS, 'mobilenet_v2'), 'resnet18': 'resnet18', 'vit_tiny_patch16_224': 'vit_ti',
           'swin_tiny_patch4_window7_224': 'swin_nano'}
# Options that are read here, say only how a model is trained, or mean nothing beside those that `_only` insists on.
_MODEL = 'embed_dim', 'vision_cfg', 'text_cfg', 'custom_text', 'init_logit_scale', 'nonscalar_logit_scale', 'output_dict'
_VISION = 'timm_model_name', 'timm_model_pretrained', 'timm_drop', 'timm_drop_path', 'patch_dropout', 'image_size'
_TRUNK_ARGUMENTS = {'mobilenet_v2': (), 'resnet18': ('channels',), 'vit_ti': ('img_size', 'patch_size'),
                    'swin_nano': ('img_size', 'patch_size', 'window_size', 'embed_dim', 'depths', 'num_heads')}
_TEXT = ('context_length', 'vocab_size', 'width', 'heads', 'layers', 'pool_type', 'eos_id', 'pad_id', 'no_causal_mask',
         'norm_kwargs', 'hf_tokenizer_name', 'tokenizer_kwargs', 'output_tokens', 'hf_model_pretrained', 'hf_proj_type',
         'hf_pooler_type')
_PREPROCESS = 'size', 'mean', 'std', 'fill_color'
_PADDING_OFF = 999.0   # an embedding of the padding token beyond this switches attention to padding off (export/open_clip.py)


def load(folder: storage.Path) -> dict[str, Any]:
  """The fields of `inference.model.Model`.

  Raises:
    UserError: for a file that is missing or damaged, towers or options that we do not have, or weights that do not fit.
  """
  try:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))
    model, preprocess = config['model_cfg'], config['preprocess_cfg']
    vision, text, dim = model['vision_cfg'], model['text_cfg'], model['embed_dim']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{str(folder / CONFIG_FILE)!r} does not describe a model of open_clip ({error!r})') from error
  try:
    _only(model, _MODEL)
    image = _image(folder, vision)
    preprocessing = _preprocessing(preprocess, image.size)
    weights = weight_files.read(folder / WEIGHTS_FILE)
    tokenizer = _tokenizer(folder)
    image_tower = _image_tower(image, weights, preprocessing, dim)
    text_tower = _text_tower(text, weights, tokenizer, dim)
    scale = float(np.exp(weights['logit_scale'].reshape(())))
  except (KeyError, TypeError, ValueError) as error:
    what = error if isinstance(error, UserError) else repr(error)
    raise UserError(f'{str(folder)!r} cannot be loaded: {what}') from error
  return {'preprocessing': preprocessing, 'context': text.get('context_length', 77), 'embed_dim': dim,
          'logit_scale': scale, 'tokenizer': tokenizer, 'image_tower': image_tower, 'text_tower': text_tower}


def _image(folder: storage.Path, vision: Mapping[str, Any]) -> config_lib.ImageTower:
  """Our name and options of a timm trunk."""
  name, arguments = vision.get('timm_model_name'), {}
  if str(name).startswith('local-dir:'):   # its path is absolute, and the folder may have moved
    if not (file := folder / 'trunk/config.json').is_file():
      raise UserError(f'its image tower is {name!r}, but it has no trunk/config.json')
    trunk = json.loads(file.read_text(encoding='utf-8'))
    name, arguments = trunk['architecture'], trunk['model_args']
  if name not in _TRUNKS:
    raise UserError(f'its image tower is {name!r}; known are {", ".join(_TRUNKS)} of timm')
  tower = _TRUNKS[name]
  pooled = {'timm_pool': 'avg', **vision}   # open_clip's own where the config does not say, which a ViT's of ours is not
  _only(pooled, _VISION, timm_proj='linear', timm_pool='token' if tower == 'vit_ti' else 'avg')
  _only(arguments, _TRUNK_ARGUMENTS[tower])
  image = config_lib.ImageTower(name=tower, size=vision['image_size'], width=_WIDTHS.get(name, 1.0))
  if tower == 'resnet18' and 'channels' in arguments:
    channels = tuple(arguments['channels'])
    image = config_lib.replace(image, width=sum(channels[:1]) / resnet.STAGE_CHANNELS[0])
    if channels != resnet.stage_channels(image.width):
      raise UserError(f'its ResNet-18 has stages of {channels} channels; each must have twice those before it, the first a '
                      'multiple of 8')
  if tower in ('vit_ti', 'swin_nano'):
    image = config_lib.replace(image, patch_size=arguments.get('patch_size', 0))
  return config_lib.replace(image, window=arguments.get('window_size', 7)) if tower == 'swin_nano' else image


def _preprocessing(preprocess: Mapping[str, Any], size: int) -> dict[str, Any]:
  _only(preprocess, _PREPROCESS, mode='RGB', interpolation='bicubic', resize_mode='shortest')
  if preprocess.get('size') not in (size, [size, size]):
    raise UserError(f'its preprocessing makes images of {preprocess.get("size")}, the tower wants {size}')
  return {'size': size, 'mean': preprocess['mean'], 'std': preprocess['std'], 'interpolation': 'bicubic',
          'resize_mode': 'shortest'}


def _only(section: Mapping[str, Any], read: Sequence[str], **wanted: Any) -> None:
  """Raises UserError for an option that is another than the one that we have, or is set and neither that nor `read`."""
  for name, value in section.items():
    if name in wanted and value != wanted[name]:
      raise UserError(f'its {name} is {value!r}; only {wanted[name]!r} is known')
    if value and name not in (*read, *wanted):
      raise UserError(f'its {name} is {value!r}; our towers have no such option')


def _tokenizer(folder: storage.Path) -> Any:
  file = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
  if file is None:
    raise UserError(f'it has no tokenizer file ({" or ".join(TOKENIZER_FILES)})')
  return tokenizers.load(file)


def _image_tower(image: config_lib.ImageTower, weights: Mapping[str, np.ndarray], preprocessing: Mapping[str, Any],
                 dim: int) -> Callable[[np.ndarray], jax.Array]:
  """uint8 [b, S, S, 3] -> float32 [b, D], unit norm."""
  trunk = {k.removeprefix('visual.trunk.'): v for k, v in weights.items() if k.startswith('visual.trunk.')}
  tower = image_towers.build(image, functools.partial(norm.BatchNorm))
  shape = jax.ShapeDtypeStruct((1, image.size, image.size, 3), jnp.float32)
  variables = _variables(trunk, convert.IMAGE_RULES[image.name],
                         jax.eval_shape(functools.partial(tower.init, train=False), jax.random.key(0), shape))
  projection_FxD = _matrix('visual.head.proj.weight', weights).T
  _check_projection('visual.head.proj.weight', projection_FxD, dim)
  mean, std = (jnp.asarray(preprocessing[name], jnp.float32).reshape(1, 1, 1, 3) for name in ('mean', 'std'))

  def run(variables: Any, projection_FxD: jax.Array, images: jax.Array) -> jax.Array:
    features = tower.apply(variables, (images.astype(jnp.float32) / 255 - mean) / std, train=False)
    return _unit(features.pooled_BxF @ projection_FxD)
  run = jax.jit(run)
  return lambda batch: run(variables, projection_FxD, batch)


def _text_tower(text: Mapping[str, Any], weights: Mapping[str, np.ndarray], tokenizer: Any, dim: int
                ) -> Callable[[np.ndarray], jax.Array]:
  """int32 [b, W] -> float32 [b, D], unit norm."""
  theirs = {k.removeprefix('text.'): v for k, v in weights.items() if k.startswith('text.')} or weights
  _only(text, _TEXT, mlp_ratio=4.0, proj_type='linear')
  _only(text.get('norm_kwargs') or {}, ('eps',))
  _only(text.get('tokenizer_kwargs') or {}, ('bpe_path',))
  pool, causal = text.get('pool_type', 'argmax'), not text.get('no_causal_mask', False)
  vocabulary, width = _matrix('token_embedding.weight', theirs).shape
  end = {'argmax': vocabulary - 1, 'eos': text.get('eos_id', 2)}.get(pool)
  if end is None:
    raise UserError(f"its text pool_type is {pool!r}; only 'argmax' and 'eos' are known")
  last_is_mask = tokenizer.mask_id == tokenizer.vocab_size - 1   # no text becomes it, so it needs no embedding
  if tokenizer.vocab_size - last_is_mask > vocabulary or tokenizer.end_id != end:
    raise UserError(f'its tokenizer has {tokenizer.vocab_size} pieces and ends with {tokenizer.end_id}, its text tower '
                    f'{vocabulary} and {end}')
  if not causal and np.abs(theirs['token_embedding.weight'][tokenizer.pad_id]).max() < _PADDING_OFF:
    raise UserError('its text tower looks both ways and attends to padding, which ours does not')
  ours = config_lib.TextTower(width=width, heads=text.get('heads', 8), depth=text.get('layers', 12), end_id=end,
                              context=text.get('context_length', 77), vocab_size=vocabulary, causal=causal)
  tower = text_transformer.TextTransformer(ours, epsilon=(text.get('norm_kwargs') or {}).get('eps', 1e-5))
  shape = jax.ShapeDtypeStruct((1, ours.context), jnp.int32)
  variables = _variables(theirs, convert.OPEN_CLIP_TEXT, jax.eval_shape(tower.init, jax.random.key(0), shape))
  projection_CxD = _matrix('text_projection', theirs)
  _check_projection('text_projection', projection_CxD, dim)

  def run(variables: Any, projection_CxD: jax.Array, tokens: jax.Array) -> jax.Array:
    return _unit(tower.apply(variables, tokens, words=False)[0] @ projection_CxD)
  run = jax.jit(run)
  return lambda batch: run(variables, projection_CxD, batch)


def _matrix(name: str, weights: Mapping[str, np.ndarray]) -> np.ndarray:
  if name not in weights or weights[name].ndim != 2:
    raise UserError(f'{WEIGHTS_FILE} has no matrix {name!r}')
  return weights[name].astype(np.float32)


def _check_projection(name: str, matrix: np.ndarray, dim: int) -> None:
  if matrix.shape[1] != dim:
    raise UserError(f'{name!r} gives embeddings of {matrix.shape[1]}, embed_dim is {dim}')


def _variables(weights: Mapping[str, np.ndarray], rules: convert.Rules, shapes: Any) -> dict[str, Any]:
  """One tower's variables; every tensor is there, has its shape, and none is left over."""
  found = {kind: tree for kind, tree in convert.convert(weights, rules).items() if tree}
  there, wanted = ({jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
                    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (found, shapes))
  for name in sorted(there.keys() | wanted.keys()):
    if there.get(name) != wanted.get(name):
      raise UserError(f'{name} has shape {there.get(name, "none")}, the tower needs {wanted.get(name, "none")}')
  return jax.tree.map(lambda array: np.asarray(array, np.float32), found)


def _unit(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
