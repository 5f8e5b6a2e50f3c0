"""Data sets by name: built-in ones, prepared folders, and sources in other formats. A built-in one is a function and a line."""
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from lightclip_jax import config as configs
from lightclip_jax import storage
from lightclip_jax.data import indexes, manifest, sources, tokenizers
from lightclip_jax.data.datasets import emoji, icons, shapes
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError

# name -> prepare(out, size in pixels, processes): makes the folder `out`, or does nothing if it is there.
BUILT_IN: dict[str, Callable[..., None]] = {
    'emoji': emoji.prepare,
    'icons': icons.prepare,
    'shapes': shapes.prepare,
}
# Counted up whenever a built-in set's contents change, so that no run continues on, or is compared with, an older one.
EDITION = {'emoji': 2, 'icons': 1, 'shapes': 1}
_PLUS = ' + '
_COLUMNS = ('image_column', 'caption_column', 'image_root')


def cache() -> pathlib.Path:
  """Where built-in data sets lie: `$LIGHTCLIP_DATA`, else the user's cache."""
  fallback = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'lightclip_jax'
  return pathlib.Path(os.environ.get('LIGHTCLIP_DATA') or fallback).expanduser()


def folder_of(name: str) -> pathlib.Path:
  """Where the present edition of a built-in data set lies, or will lie."""
  return cache() / f'{name}-{EDITION[name]}'


def resolve(name: str, options: configs.Data | None = None, tokenizer: tokenizers.Tokenizer | None = None) -> storage.Path:
  """The folder of a data set; a built-in one is prepared in the cache if it is not there yet.

  For KIND:PATH, for several joined by " + ", and for a prepared folder with another tokenizer than its own, or of which records
  are to be held out, that is a folder in the cache with a manifest that points to them, the tokenizer, and indexes; the data
  stay where they are. Held-out splits and concepts are those of the first prepared folder.

  Args:
    name: a built-in name, a prepared folder, KIND:PATH, or several.
    options: `config.data`; columns, weights and tokenizer of such sources come from it.
    tokenizer: a checkpoint's, instead of theirs; its file need not be there any more.

  Raises:
    UserError: for something that is none of these, for an option that it would ignore, or if the preparation fails.
  """
  options = options or configs.Data()
  if is_prepared(name):
    _check_nothing_ignored(name, options)
  if is_prepared(name) and not options.tokenizer and not options.holdout_every:
    folder = _prepared(name)
    manifest.load(folder)
    return folder
  contents = about(name, options)
  return _point_to(name, contents, tokenizer or tokenizers.load(_tokenizer_file(name, contents, options)))


def whole(name: str, tokenizer: tokenizers.Tokenizer) -> storage.Path:
  """As `resolve`, of data that a model with this tokenizer is only evaluated on: all records of KIND:PATH, or of several, are
  the split `heldout`."""
  if is_prepared(name):
    return resolve(name)
  return _point_to(name, {**about(name, configs.Data()), 'holdout_every': 1}, tokenizer)


def is_prepared(name: str) -> bool:
  """Whether a data set is one prepared folder, or a built-in set, by its name."""
  return _PLUS not in name and name.partition(':')[0] not in sources.SOURCES


def _check_nothing_ignored(name: str, options: configs.Data) -> None:
  decisive = () if options.tokenizer else ('weights',)   # with another tokenizer it is a mixture of one part
  if options.holdout_every and not options.tokenizer and (name in BUILT_IN or len(manifest.load(_prepared(name)).splits) > 1):
    raise UserError(f'data.holdout_every is {options.holdout_every}, but {name!r} has held-out splits already; leave it at 0')
  for option in (*_COLUMNS, *decisive):
    if value := getattr(options, option):
      raise UserError(f'data.{option} is {value!r}, but {name!r} is one prepared set, where it changes nothing; leave '
                      f'it at {getattr(configs.Data(), option)!r}')


def _check_columns_used(parts: list[Spec], options: configs.Data) -> None:
  kinds = list(dict.fromkeys(part.kind for part in parts))
  for option in _COLUMNS:
    users = [kind for kind in sources.SOURCES if option not in sources.IGNORED.get(kind, ())]
    if (value := getattr(options, option)) and not set(users) & set(kinds):
      raise UserError(f"data.{option} is {value!r}, which {' and '.join(kinds)} would ignore; leave it at '' (it is for "
                      f'{", ".join(users)})')


def about(name: str, options: configs.Data) -> dict[str, Any]:
  """What `sources.open_parts` opens, for KIND:PATH or several. Raises as `resolve`."""
  parts = [_spec(part.strip(), options) for part in name.split(_PLUS)]
  _check_columns_used(parts, options)
  if options.weights and (len(options.weights) != len(parts) or min(options.weights) <= 0):
    raise UserError(f'data.weights is {options.weights}; {name!r} needs {len(parts)} numbers above 0')
  if options.holdout_every < 0 or options.holdout_every == 1:
    raise UserError(f'data.holdout_every is {options.holdout_every}; it must be 0 (none) or at least 2')
  return {'parts': [part.json() for part in parts], 'weights': options.weights, 'holdout_every': options.holdout_every}


def _prepared(name: str) -> storage.Path:
  if name in BUILT_IN:
    BUILT_IN[name](folder_of(name))
    return folder_of(name)
  folder = storage.path(name).expanduser()
  if not folder.exists():
    kinds = ', '.join(f'{kind}:' for kind in sources.SOURCES)
    raise UserError(f'data set {name!r} is neither a folder nor a built-in name ({", ".join(BUILT_IN)}) nor KIND:PATH '
                    f'({kinds})')
  return folder


def _spec(name: str, options: configs.Data) -> Spec:
  if name.partition(':')[0] not in sources.SOURCES:   # a prepared folder as a part of a mixture
    folder = _prepared(name)
    manifest.load(folder)
    return Spec('array_record', str(folder if storage.in_bucket(folder) else folder.absolute()))
  kind, path = sources.parse(name)
  path = path if '://' in path or kind == 'tfds' else os.path.abspath(os.path.expanduser(path))
  spec = Spec(kind, path, options.image_column, options.caption_column, options.image_root)
  return dataclasses.replace(spec, index=str(cache() / 'indexes' / indexes.digest(spec.json())))


def _tokenizer_file(name: str, contents: dict[str, Any], options: configs.Data) -> storage.Path:
  if options.tokenizer:
    return storage.path(options.tokenizer).expanduser()
  if folder := sources.prepared(contents):
    return storage.path(folder) / manifest.load(folder).tokenizer
  raise UserError(f'{name!r} brings no tokenizer; set data.tokenizer to a file (python -m lightclip_jax.prepare tokenizer '
                  'makes one)')


def _point_to(name: str, about: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> pathlib.Path:
  """A folder in the cache with the tokenizer and a manifest of what the sources hold now."""
  file = f'tokenizer{tokenizer.suffix}'
  train = sources.open_parts(about, 'train')
  splits = {'train': manifest.Split(('train',), len(train))}
  if about['holdout_every']:
    splits[sources.HELDOUT] = manifest.Split((sources.HELDOUT,), len(sources.open_parts(about, sources.HELDOUT)))
  hashes = {split: train.fingerprint for split in splits}
  contents = manifest.Manifest(
      name=name, splits=splits, tokenizer=file, image_size=0, concepts=(), groups=(), licences={}, packages={}, sha256=hashes,
      source=about)
  if first := sources.prepared(about):   # which is evaluated
    of = manifest.load(first)
    contents = dataclasses.replace(
        contents, splits={**of.splits, **splits}, concepts=of.concepts, groups=of.groups, sha256={**of.sha256, **hashes})
  contents.sha256[file] = indexes.digest(tokenizer.to_bytes().hex())
  folder = cache() / 'sources' / indexes.digest([about, contents.sha256])
  if not (folder / manifest.FILE_NAME).is_file():
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:   # renamed file by file: others may write the same ones
      (pathlib.Path(partial) / file).write_bytes(tokenizer.to_bytes())
      contents.save(pathlib.Path(partial))
      for part in (file, manifest.FILE_NAME):
        (pathlib.Path(partial) / part).replace(folder / part)
  return folder
