"""What must fit together before a run starts. Each failure is one line that names the value and what would be right."""
import base64
import contextlib
import dataclasses
import json
import operator
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, storage
from lightclip_jax.data import manifest, tokenizers
from lightclip_jax.errors import UserError
from lightclip_jax.models import image_towers

# These may change between a run and its continuation: they do not change what is learnt.
FREE = ('train.log_every', 'train.accumulate', 'train.text_lengths', 'train.max_skipped', 'train.name_nans',
        'train.watchdog_minutes', 'train.watchdog_exit', 'checkpoint', 'evaluation', 'mesh', 'data.workers', 'data.prefetch',
        'data.dataset', 'data.tokenizer', 'data.image_root', 'data.max_faults', 'name')
SCORED = ('checkpoint.best', 'checkpoint.best_mode')   # these may not, once there are scores: two kinds do not compare
PLACED = ('mesh', 'train.accumulate')   # nor these where batch normalisation's statistics are a device's own


def check_batch(config: config_lib.Config, shards: int) -> None:
  """The global batch divides into devices, micro-batches and groups.

  Raises:
    UserError: naming the sizes.
  """
  _at_least(config, 1, 'train.accumulate')
  batch, accumulate = config.train.batch_size, config.train.accumulate
  parts = shards * accumulate
  if batch < 1 or batch % parts:
    raise UserError(f'train.batch_size is {batch}; it must be a multiple of {parts} '
                    f'({shards} devices × accumulate {accumulate})')
  if accumulate > 1 and config.model.batch_norm == 'global' and config.model.image.name in image_towers.BATCH_NORM:
    raise UserError(f"train.accumulate is {accumulate} and model.batch_norm 'global', whose statistics need the whole batch at "
                    "once; 'group:N' has the same ones for any number of micro-batches")
  size = _group(config.model.batch_norm)
  groups = {'model.batch_norm': size} if config.model.image.name in image_towers.BATCH_NORM else {}
  if not config.objective.token_matching.weight.is_zero:
    groups['objective.token_matching.group_size'] = config.objective.token_matching.group_size
  for name, size in groups.items():
    share = batch // shards if name.startswith('objective') else batch // parts
    if size < 1 or share % size:
      raise UserError(f'{name} is a group of {size} examples, which does not divide the {share} of a device '
                      f'(train.batch_size {batch} on {shards} devices, accumulate {accumulate})')


def _group(batch_norm: str) -> int:
  """N of 'group:N'; 1 for the kinds without groups."""
  kind, _, size = batch_norm.partition(':')
  if kind == 'group' and size.isdecimal():
    return int(size)
  if batch_norm in ('global', 'local'):
    return 1
  raise UserError(f"model.batch_norm is {batch_norm!r}; it can be 'group:N', 'global' or 'local'")


def check_tokenizer(config: config_lib.Config, tokenizer: tokenizers.Tokenizer) -> None:
  """The text tower's vocabulary and end token are the tokenizer's.

  Raises:
    UserError: naming both.
  """
  text = config.model.text
  if tokenizer.vocab_size != text.vocab_size:
    raise UserError(f'model.text.vocab_size is {text.vocab_size}, but the tokenizer of {config.data.dataset!r} has '
                    f'{tokenizer.vocab_size} pieces')
  if tokenizer.end_id != text.end_id:
    raise UserError(f'model.text.end_id is {text.end_id}, but the tokenizer of {config.data.dataset!r} ends with '
                    f'{tokenizer.end_id}')


def check_same_tokenizer(saved: str, tokenizer: tokenizers.Tokenizer) -> None:
  """A run continues with the tokenizer that it began with; `data.tokenizer` may only say that the file lies elsewhere.

  Args:
    saved: the checkpoint's, its file in base64.
    tokenizer: the data's.

  Raises:
    UserError: if they are two.
  """
  if base64.b64decode(saved) != tokenizer.to_bytes():
    raise UserError('the tokenizer of the data is another than that of the run, whose words would get other ids; give the file '
                    'that the run began with as data.tokenizer, or use another --workdir')


def check_same_groups(config: config_lib.Config, before: int, now: int) -> None:
  """Where batch normalisation's statistics are a device's own, a run continues on as many devices.

  Args:
    config: the run's.
    before: devices that shared the batch; 0: not known.
    now: those that do.

  Raises:
    UserError: naming both.
  """
  groups = config.model.batch_norm == 'local' and config.model.image.name in image_towers.BATCH_NORM
  if groups and before not in (0, now):
    raise UserError(f"model.batch_norm is 'local', whose statistics are of a device's own share of the batch: the run began "
                    f'with {before} devices for the batch, here are {now}; bring as many, or use another --workdir')


def check_splits(config: config_lib.Config, folder: storage.Path) -> None:
  """The data have the splits that are evaluated.

  Raises:
    UserError: naming the first that is missing or empty, or if there is none at all; a run must not end with that.
  """
  contents = manifest.load(folder)
  if not config.evaluation.splits:
    raise UserError(f'evaluation.splits is empty; it must name one of {", ".join(contents.splits)} '
                    '(data.holdout_every makes one)')
  for split in config.evaluation.splits:
    if split not in contents.splits:
      raise UserError(f'evaluation.splits names {split!r}, which {config.data.dataset!r} does not have; it has: '
                      f'{", ".join(contents.splits)} (data.holdout_every makes one)')
    if not contents.splits[split].count:
      raise UserError(f'evaluation.splits names {split!r}, of which {config.data.dataset!r} has no record; name a split with '
                      'records, or prepare the data again with another --holdout_every')


def check_teacher(config: config_lib.Config, dim: int) -> None:
  """The teacher's embeddings beside the data have the dimension that the step is compiled for.

  Raises:
    UserError: naming both.
  """
  if config.objective.distillation.teacher_dim != dim:
    raise UserError(f'objective.distillation.teacher_dim is {config.objective.distillation.teacher_dim}, but the teacher of '
                    f'{config.data.dataset!r} has embeddings of {dim}')


def check_steps(config: config_lib.Config) -> None:
  """Counts that must be positive, and lengths of texts.

  Raises:
    UserError: naming the first that is not.
  """
  _in_range(config, lambda value: 1 <= value < 1 << 31, 'at least 1 and below 2^31', 'train.steps')
  _at_least(config, 1, 'train.log_every', 'train.max_skipped', 'evaluation.batch_size', 'checkpoint.keep',
            'data.prefetch')
  _at_least(config, 0, 'evaluation.every_steps', 'checkpoint.every_steps')
  _at_least(config, 0 if config.objective.masked_lm.weight.is_zero else 1, 'data.max_masked')
  _in_range(config, lambda value: 0 <= value < 1 << 63, 'at least 0 and below 2^63', 'train.seed')
  for name in ('crop_scale', 'crop_ratio'):
    low, high = getattr(config.data, name)
    if not 0 < low <= high:
      raise UserError(f'data.{name} is ({low}, {high}); it must be two numbers above 0, the smaller one first')
  for length in config.train.text_lengths:
    if not 2 <= length <= config.model.text.context:
      raise UserError(f'train.text_lengths has {length}; a text has 2 to model.text.context {config.model.text.context} '
                      'positions')


def check_model(model: config_lib.Model) -> None:
  """Sizes that must be positive.

  Raises:
    UserError: naming the first that is not.
  """
  _at_least(model, 1, 'image.size', 'embed_dim', 'token_dim', 'text.width', 'text.heads', 'text.depth', 'text.vocab_size',
            'fusion.heads', prefix='model.')
  _at_least(model, 2, 'text.context', prefix='model.')
  if not model.logit_scale_init > 0:
    raise UserError(f'model.logit_scale_init is {model.logit_scale_init}; it must be above 0')
  if len(set(model.fusion.stages)) < len(model.fusion.stages):
    raise UserError(f'model.fusion.stages is {model.fusion.stages}; each pair can be there once')


def check_numbers(config: config_lib.Config) -> None:
  """Rates, fractions and temperatures, which would teach nothing, or the opposite, or first fail in a workdir that is taken.

  Raises:
    UserError: naming the first that is out of its range.
  """
  _at_least(config, 0, 'optimizer.learning_rate', 'optimizer.matrix_learning_rate', 'optimizer.weight_decay',
            'optimizer.clip_norm', 'train.watchdog_minutes', 'checkpoint.every_minutes', 'evaluation.every_minutes',
            'data.color_jitter', *(f'objective.{term}.weight.{end}' for end in ('start', 'end')
                                   for term in ('contrastive', 'token_matching', 'masked_lm', 'distillation')))
  _at_least(config, 1, 'objective.token_matching.num_iterations', 'objective.distillation.teacher_dim', 'data.max_pixels')
  softening = [f'objective.contrastive.{name}.{end}' for name in ('alpha', 'beta') for end in ('start', 'end')]
  _in_range(config, lambda value: 0 <= value <= 1, '0 to 1', 'optimizer.warmup_fraction', 'data.flip',
            'data.first_caption', 'data.mask_fraction', 'data.max_faults', *softening)
  _in_range(config, lambda value: 0 <= value < 1, 'at least 0 and below 1', 'model.text.dropout', 'model.image.drop_path',
            'model.batch_norm_momentum', 'optimizer.b1', 'optimizer.b2', 'optimizer.ema_decay')
  _in_range(config, lambda value: value > 0, 'above 0', 'optimizer.eps', 'objective.contrastive.target_temperature',
            'objective.distillation.temperature', 'objective.token_matching.epsilon')
  objective = config.objective
  schedules = {f'{term}.weight': getattr(objective, term).weight for term in vars(objective)}
  schedules |= {f'contrastive.{name}': getattr(objective.contrastive, name) for name in ('alpha', 'beta')}
  for name, schedule in schedules.items():
    if not 0 <= schedule.begin <= schedule.finish <= 1:
      raise UserError(f'objective.{name} begins at {schedule.begin} and finishes at {schedule.finish}; '
                      'these are fractions of the training from 0 to 1, the smaller one first')


def _in_range(config: Any, fits: Callable[[float], bool], what: str, *names: str) -> None:
  for name in names:
    if not fits(value := operator.attrgetter(name)(config)):
      raise UserError(f'{name} is {value}; it must be {what}')


def _at_least(config: Any, least: int, *names: str, prefix: str = '') -> None:
  for name in names:
    if (value := operator.attrgetter(name)(config)) < least:
      raise UserError(f'{prefix}{name} is {value}; it must be at least {least}')


def check_same_everywhere(config: config_lib.Config) -> None:
  """All processes must call it. Raises UserError, in each of them, if some have another config; what differs is named."""
  texts = distributed.texts_of_all(json.dumps(dataclasses.asdict(config)))
  first = _flat(json.loads(texts[0]))
  for number, text in enumerate(texts):
    if shown := _differing(first, _flat(json.loads(text)), 'in process 0', f'in process {number}'):
      raise UserError(f'processes have different configs ({shown}); start the same command on every host')


def check_shared(workdir: storage.Path) -> None:
  """All processes have one workdir, which they must call with: else each would save its own half, and none could be read.

  Raises:
    UserError: in each of them, if they have not.
  """
  if jax.process_count() == 1:
    return
  proof = workdir / f'shared-{distributed.texts_of_all(secrets.token_hex(8))[0]}'
  with distributed.first_alone('shared workdir'):
    if jax.process_index() == 0:
      proof.touch()
  found = any(proof.exists() or time.sleep(seconds) for seconds in (0.0, *storage.WAITS))   # the disks of others may be late
  apart = distributed.texts_of_all('' if found else str(workdir))
  if jax.process_index() == 0:
    proof.unlink()
  for number, other in enumerate(apart):
    if other:
      raise UserError(f'process {number} does not find in its workdir {other!r} what process 0 writes there; all need the same '
                      'folder, on a disk that they share or in a bucket')


def claim_workdir(workdir: storage.Path, config: config_lib.Config) -> None:
  """Writes `config.json` into a new workdir (one process does), or checks that an old one holds the same run.

  Raises:
    UserError: if the workdir belongs to a run with another config; the first differing options are named.
  """
  is_claimed(workdir, config)
  if jax.process_index() > 0:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write_text(workdir / 'config.json', json.dumps(dataclasses.asdict(config), indent=2) + '\n')


def is_claimed(workdir: storage.Path, config: config_lib.Config) -> bool:
  """Whether the workdir holds this run already. Raises UserError where it holds another."""
  path, defaults = workdir / 'config.json', _flat(dataclasses.asdict(config_lib.Config()))
  if not path.exists():
    return False
  try:
    before = defaults | _flat(json.loads(path.read_text()))   # an option that is younger than the run had its default
  except ValueError as error:
    raise UserError(f'{str(path)!r} is not JSON ({error}); use another --workdir') from error
  now = _flat(json.loads(json.dumps(dataclasses.asdict(config))))
  fixed = SCORED if any((workdir / 'checkpoints').glob('*/metrics')) else ()   # Orbax's name for what was scored
  fixed += PLACED if before['model.batch_norm'] == 'local' else ()
  names = [name for name in before.keys() | now.keys() if _is_of(name, fixed) or not _is_of(name, FREE)]
  if shown := _differing(*({name: values.get(name) for name in names} for values in (before, now)), 'there', 'here'):
    raise UserError(f'{str(workdir)!r} holds a run with another config ({shown}); use another --workdir')
  return True


@contextlib.contextmanager
def alone(workdir: storage.Path) -> Iterator[None]:
  """Makes the workdir, in which nobody else trains meanwhile: two that did would cut off each other's logs and checkpoints.

  A process that does is waited for, since it may be saving. Buckets, and disks that have no locks for folders (NFS), are not
  protected.

  Raises:
    UserError: where the other one goes on.
  """
  if jax.process_index() > 0 or storage.in_bucket(workdir):   # process 0 holds it for all
    yield
    return
  with storage.alone(workdir, 'trains in', '--workdir', patient=True):
    yield


def _differing(one: dict[str, Any], other: dict[str, Any], where: str, elsewhere: str) -> str:
  """The first three options that differ, in words; '' if none does."""
  names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
  return ', '.join(f'{name} {one.get(name)!r} {where}, {other.get(name)!r} {elsewhere}' for name in names[:3])


def _is_of(name: str, options: tuple[str, ...]) -> bool:
  return any(name == option or name.startswith(option + '.') for option in options)


def _flat(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  out = {}
  for name, value in values.items():
    out |= _flat(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value}
  return out
