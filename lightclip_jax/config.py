"""The typed configuration: every option of a run, its default and what it means.

A config file (`configs/*.py`) has `get_config(variant)`, which returns a `Config`, or an `ml_collections.ConfigDict` of all
options or only of those that differ from the defaults. `load` applies command-line overrides
(`--config.optimizer.learning_rate=1e-3`) and turns the result into frozen dataclasses; every name and type is checked, with
"did you mean" for a name that does not exist. Values are literals: nothing is evaluated.
"""
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
import pathlib
import sys
import types
import typing
from typing import Any, Literal

from ml_collections import config_dict

from lightclip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A number as a function of the training fraction in [0, 1]: `start` until `begin`, then to `end` at `finish`."""
  start: float = 0.0
  end: float = 0.0
  begin: float = 0.0
  finish: float = 1.0
  shape: Literal['linear', 'cosine'] = 'linear'

  @property
  def is_zero(self) -> bool:
    """Whether it is 0 throughout."""
    return (self.start, self.end) == (0, 0)


def constant(value: float) -> Schedule:
  """A schedule that does not change."""
  return Schedule(start=value, end=value)


@dataclasses.dataclass(frozen=True)
class ImageTower:
  """The image tower. Options that a tower has no use for must keep their defaults."""
  name: Literal['mobilenet_v2', 'resnet18', 'swin_nano', 'vit_ti'] = 'mobilenet_v2'
  size: int = 224              # pixels, square
  width: float = 1.0           # channel multiplier (mobilenet_v2, resnet18)
  stem_stride: int = 2         # 1 keeps twice the resolution throughout, for small images (mobilenet_v2, resnet18)
  patch_size: int = 0          # 0: the tower's own (swin_nano 4, vit_ti 16)
  window: int = 7              # attention window in tokens (swin_nano)
  drop_path: float = 0.0       # stochastic depth of the last block, linear from 0 (swin_nano, vit_ti)


@dataclasses.dataclass(frozen=True)
class TextTower:
  """The text Transformer: pre-norm, pooled at the end token, projected."""
  width: int = 512
  heads: int = 8
  depth: int = 6
  context: int = 77            # positions, start and end token included
  vocab_size: int = 8192       # must be the tokenizer's
  end_id: int = 3              # id of the end token: the text embedding is read there, later positions are padding
  causal: bool = False
  dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Fusion:
  """How image features enter the masked text (training only)."""
  stages: tuple[tuple[int, int], ...] = ((1, 2), (2, 4), (3, 6))   # (image stage, after this text block; both from 1)
  op: Literal['cross_attention', 'add'] = 'cross_attention'
  heads: int = 8


@dataclasses.dataclass(frozen=True)
class Model:
  """The two towers, their projections and the training-only heads."""
  embed_dim: int = 512         # D: the shared embedding
  token_dim: int = 256         # d: patches and words in the token matching
  token_stage: int = 0         # whose patches are matched: 1 to 4, the tower's stages from fine to coarse; 0: its last tokens
  image: ImageTower = ImageTower()
  text: TextTower = TextTower()
  fusion: Fusion = Fusion()
  batch_norm: str = 'group:64'  # over which examples statistics run: 'group:N', 'global', or 'local', a device's own
  batch_norm_momentum: float = 0.99
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'
  logit_scale_init: float = 1 / 0.07
  logit_bias_init: float = -10.0   # used by the sigmoid loss only


@dataclasses.dataclass(frozen=True)
class Data:
  """Where pairs come from and how they are augmented."""
  dataset: str = 'emoji'       # built-in name, folder made by `lightclip_jax.prepare`, KIND:PATH, or several with ' + '
  weights: tuple[float, ...] = ()   # of the parts of a mixture; (): as many examples of each as it has records
  tokenizer: str = ''          # a tokenizer file; '': that of the first prepared folder, other sources bring none
  image_column: str = ''       # of tables, Parquet and TFDS; '': the usual names, such as filepath
  caption_column: str = ''     # of these, and of JSON beside images, which then goes before text; '': the usual names
  image_root: str = ''         # folder that a table's image paths are relative to; '': the table's own; of TFDS its folder
  holdout_every: int = 0       # N: of data without held-out records each N-th (of tables: image) is 'heldout', not trained on
  max_pixels: int = 1 << 26    # larger images are left out before they are decoded
  max_faults: float = 0.1      # share of records that cannot be used above which a run stops
  workers: int = -1            # decoding processes; 0: threads, -1: threads on up to 4 cores, else cores - 1, 16 at most
  prefetch: int = 4            # batches each worker keeps ready
  crop_scale: tuple[float, float] = (0.4, 1.0)    # RandomResizedCrop: area
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = 0.0            # probability; 0 by default, since captions may speak of left and right
  color_jitter: float = 0.0    # strength of brightness, contrast and saturation
  rand_augment: int = 0        # random operations on each image (data/rand_augment.py); 0: none
  rand_augment_strength: float = 0.3   # of each, 0 to 1
  first_caption: float = 0.0   # probability of the first caption (the name); the rest is uniform over all
  mask_fraction: float = 0.15  # of the words, for masked language modelling
  max_masked: int = 12         # K: masked positions in a batch's static shape
  mosaic: float = 0.0          # share of examples that up to three more join, on a 2×2 grid, their captions joined by "and"


@dataclasses.dataclass(frozen=True)
class Contrastive:
  """The progressively softened contrastive loss (docs/OBJECTIVES.md, 1)."""
  kind: Literal['softmax', 'sigmoid'] = 'softmax'
  weight: Schedule = constant(1.0)
  alpha: Schedule = Schedule(0.0, 0.2)
  beta: Schedule = Schedule(0.0, 1.0)
  target_temperature: float = 0.1
  target_source: Literal['cross', 'intra'] = 'intra'
  duplicates: Literal['negative', 'positive', 'ignore'] = 'positive'


@dataclasses.dataclass(frozen=True)
class TokenMatching:
  """The Sinkhorn-relaxed matching of patches and words (docs/OBJECTIVES.md, 2). Weight 0: not computed."""
  weight: Schedule = constant(0.5)
  group_size: int = 16
  epsilon: float = 0.05
  num_iterations: int = 20
  kind: Literal['sinkhorn', 'max'] = 'sinkhorn'   # max: FILIP's, each patch its best word and each word its best patch


@dataclasses.dataclass(frozen=True)
class MaskedLM:
  """Fusion masked language modelling (docs/OBJECTIVES.md, 3). Weight 0: not computed."""
  weight: Schedule = constant(0.5)


@dataclasses.dataclass(frozen=True)
class Distillation:
  """A teacher's similarities as soft targets (docs/OBJECTIVES.md, 4). Weight 0: not computed, and no teacher is read."""
  weight: Schedule = constant(0.0)
  temperature: float = 0.02    # T of the teacher's softmax; `lightclip_jax.prepare teacher` prints the teacher's own
  teacher_dim: int = 512       # E: the teacher's embedding; `lightclip_jax.prepare teacher` prints it


@dataclasses.dataclass(frozen=True)
class Objective:
  """L = contrastive + token matching + masked LM + distillation, each with its own weight."""
  contrastive: Contrastive = Contrastive()
  token_matching: TokenMatching = TokenMatching()
  masked_lm: MaskedLM = MaskedLM()
  distillation: Distillation = Distillation()


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW or Muon (arXiv:2502.16982), with linear warm-up and cosine decay to zero."""
  name: Literal['adamw', 'muon'] = 'adamw'   # muon: matrices by orthogonalised momentum, all else by AdamW
  learning_rate: float = 1e-3  # AdamW's
  matrix_learning_rate: float = 4e-3   # Muon's; it wants some times AdamW's
  warmup_fraction: float = 0.05
  weight_decay: float = 0.1    # not on norms, biases, embeddings of position or scales
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-6
  clip_norm: float = 1.0       # 0: no clipping
  ema_decay: float = 0.0       # 0: no moving average; else evaluation and export use it
  freeze: str = ''             # regular expression of parameters that stay as they are, such as '^image/'; '': none


@dataclasses.dataclass(frozen=True)
class Initialise:
  """What a fresh run starts from; '' is chance. Later ones overwrite: checkpoint, image, text."""
  checkpoint: str = ''         # a workdir of lightclip_jax.main
  checkpoint_pattern: str = '.*'   # regular expression of the paths to take from it, such as '^params/text/'
  image: str = ''              # a .safetensors or .pth file by the names of timm, torchvision or open_clip
  text: str = ''               # the same, by open_clip's names
  vocabulary: Literal['error', 'skip', 'rows'] = 'error'   # token embeddings of another number; 'rows': those both have


@dataclasses.dataclass(frozen=True)
class Train:
  """Length, batch and logging."""
  steps: int = 1000
  batch_size: int = 1024       # global
  accumulate: int = 1          # encoder micro-batches; the loss is over the full batch whatever this is
  text_lengths: tuple[int, ...] = ()   # a batch's texts are cut to the first that holds the longest, if any does; one
                               # compilation each; for one process and small batches (large ones have a long text always)
  matmul_precision: Literal['default', 'bfloat16'] = 'default'   # bfloat16: CPUs round the factors of float32 products,
                               # as TPUs do by default; where the processor has a matrix unit, that is some times as fast
  log_every: int = 20
  seed: int = 0
  max_skipped: int = 10        # steps in a row whose loss or gradients are not finite, after which a run stops
  name_nans: bool = False      # at the first such step, find and name the operation that made the NaN, and stop
  watchdog_minutes: float = 20.0   # without a step, after which the threads' stacks are written; 0: never
  watchdog_exit: bool = False  # end then, with a code on which the launch scripts start again


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """When to save, whichever comes first, and how many to keep. 0 switches a clock off."""
  every_steps: int = 1000
  every_minutes: float = 15.0
  keep: int = 3
  best: str = ''               # a metric such as 'eval/heldout_style/concept_top1': its best checkpoint is kept as well
  best_mode: Literal['max', 'min'] = 'max'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """When and how to evaluate during training; always once at the end."""
  every_steps: int = 1000
  every_minutes: float = 0.0   # and whenever so much time has passed; 0: by steps alone
  batch_size: int = 256        # global; the last batch is padded
  splits: tuple[str, ...] = ('heldout_images', 'heldout_style', 'heldout_concepts')
  tasks: tuple[str, ...] = ()  # more tasks by name (docs/EVALUATION.md), such as 'linear_probe:digits'


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; one -1 takes what is left."""
  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that decides a run."""
  name: str = 'lightclip'
  model: Model = Model()
  data: Data = Data()
  objective: Objective = Objective()
  optimizer: Optimizer = Optimizer()
  init: Initialise = Initialise()
  train: Train = Train()
  checkpoint: Checkpoint = Checkpoint()
  evaluation: Evaluation = Evaluation()
  mesh: Mesh = Mesh()


def replace(config: Any, **changes: Any) -> Any:
  """A copy of a frozen config with nested changes: `replace(c, model=dict(image=dict(size=64)))`."""
  out = {}
  for name, value in changes.items():
    known = [f.name for f in dataclasses.fields(config)]
    if name not in known:
      raise UserError(f'unknown config key {name!r}{_did_you_mean(name, known)}')
    old = getattr(config, name)
    nested = dataclasses.is_dataclass(old) and isinstance(value, dict)
    out[name] = replace(old, **value) if nested else value
  return dataclasses.replace(config, **out)


def to_config_dict(config: Config) -> config_dict.ConfigDict:
  """The locked `ml_collections` form, which command-line flags override."""
  return config_dict.ConfigDict(dataclasses.asdict(config)).lock()


def load(spec: str, overrides: typing.Mapping[str, str] | None = None) -> Config:
  """The config of "FILE.py" or "FILE.py:VARIANT", with overrides {"train.steps": "100"}.

  Raises:
    UserError: for a missing file, an unknown variant or key, or a value of another type.
  """
  values = config_dict.ConfigDict(_merged(dataclasses.asdict(Config()), _from_file(spec)))
  with values.ignore_type():   # `from_dict` checks types, and says more
    for key, text in (overrides or {}).items():
      kind = check_key(key)
      if dataclasses.is_dataclass(kind) and kind is not Schedule:   # as a whole it would reset what is not named
        raise UserError(f'config.{key} is {text}, but it has parts ({", ".join(f.name for f in dataclasses.fields(kind))}); '
                        f'give them one by one, as config.{key}.{dataclasses.fields(kind)[0].name}=…')
      try:
        values.update_from_flattened_dict({key: _literal(text)})
      except KeyError as error:   # of a section that an override before has made a value
        raise UserError(f'config.{key} is {text}, but what it is part of has a value already; give one of the two') from error
  return from_dict(values.to_dict())


def _merged(values: dict[str, Any], over: typing.Mapping[str, Any]) -> dict[str, Any]:
  """`values` with those of `over` in their place, part by part."""
  parts = {name: _merged(values[name], value) for name, value in over.items()
           if isinstance(value, dict) and isinstance(values.get(name), dict)}
  return {**values, **over, **parts}


def _from_file(spec: str) -> dict[str, Any]:
  """What `get_config(variant)` returns: all of a config, or what differs from the defaults."""
  file, _, variant = spec.partition(':')
  get_config, given = _get_config_of(pathlib.Path(file)), (variant,) if variant else ()
  try:
    inspect.signature(get_config).bind(*given)
  except TypeError as error:
    raise UserError(f'{spec!r} names {f"the variant {variant!r}" if variant else "no variant"}, but {file!r} has get_config'
                    f'{inspect.signature(get_config)}; it must be get_config(variant=…)') from error
  values = get_config(*given)
  if isinstance(values, Config):
    return dataclasses.asdict(values)
  if isinstance(values, config_dict.ConfigDict):
    return values.to_dict()
  raise UserError(f'get_config of {spec!r} returns {values!r}; it must be a Config or a ConfigDict')


def _get_config_of(path: pathlib.Path) -> typing.Callable[..., Any]:
  if not path.is_file():
    near = difflib.get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [], n=1)
    raise UserError(f'config file {str(path)!r} does not exist' + (f'; did you mean {near[0]!r}?' if near else ''))
  root = str(path.resolve().parent.parent)   # config files import each other as `configs.NAME` from any working directory
  if root not in sys.path:
    sys.path.append(root)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None:
    raise UserError(f'config file {str(path)!r} is no Python file; a config is one that has get_config(variant), such as '
                    'configs/mbv2.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise UserError(f'config file {str(path)!r} has no function get_config(variant)')
  return module.get_config


def _literal(text: str) -> Any:
  """A Python literal, true or false, or else the text itself."""
  try:
    return {'true': True, 'false': False}.get(text) if text in ('true', 'false') else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def from_dict(values: typing.Mapping[str, Any]) -> Config:
  """The typed form of a nested dict (from JSON or a ConfigDict).

  Raises:
    UserError: for an unknown key (with the nearest known one) or a value of another type; the key is named in full.
  """
  return _build(Config, values, 'config')


def check_key(path: str) -> Any:
  """The annotated type of the option that `path` ("model.image.size") names. Raises UserError if there is none."""
  cls: Any = Config
  done = 'config'
  for part in path.split('.'):
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    if part not in hints:
      raise UserError(f'unknown config key {done}.{part}{_did_you_mean(part, list(hints))}')
    cls, done = hints[part], f'{done}.{part}'
  return cls


def _did_you_mean(name: str, known: list[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'; did you mean {near[0]!r}?' if near else f'; it has: {", ".join(known)}' if known else ''


def _build(cls: Any, values: typing.Mapping[str, Any], path: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      raise UserError(f'unknown config key {path}.{name}{_did_you_mean(name, list(hints))}')
  return cls(**{name: _convert(hints[name], value, f'{path}.{name}') for name, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
  """`value` as the annotated type, or a UserError that names `path`."""
  if dataclasses.is_dataclass(hint):
    if isinstance(value, typing.Mapping):
      return _build(hint, value, path)
    if hint is Schedule and isinstance(value, (int, float)) and not isinstance(value, bool):
      return constant(_convert(float, value, path))
  origin = typing.get_origin(hint)
  if origin is Literal:
    if value in typing.get_args(hint):
      return value
    raise UserError(f'{path} is {value!r}; it can be one of {", ".join(map(repr, typing.get_args(hint)))}')
  if origin is tuple and isinstance(value, (tuple, list)):
    return _convert_tuple(typing.get_args(hint), value, path)
  if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    if not abs(value) <= sys.float_info.max:   # as of NaN, and of whole numbers that are larger than any float
      raise UserError(f'{path} is {value!r}; it must be a finite number')
    return float(value)
  if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and type(value) is hint:
    return value
  raise UserError(f'{path} is {value!r}; it must be of type {getattr(hint, "__name__", hint)}')


def _convert_tuple(args: tuple[Any, ...], value: typing.Sequence[Any], path: str) -> tuple[Any, ...]:
  if len(args) == 2 and args[1] is Ellipsis:
    return tuple(_convert(args[0], v, f'{path}[{i}]') for i, v in enumerate(value))
  if len(args) != len(value):
    raise UserError(f'{path} has {len(value)} values; it needs {len(args)}')
  return tuple(_convert(a, v, f'{path}[{i}]') for i, (a, v) in enumerate(zip(args, value, strict=True)))
