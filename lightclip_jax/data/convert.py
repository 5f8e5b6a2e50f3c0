"""Any source to a prepared folder: images checked (and resized), captions cleaned, duplicates left out, all of it counted.

The work is done in parts of one shard each, by several processes. A part that is done has a note beside its shard, so that
an interrupted preparation goes on where it was.
"""
import array
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
import tqdm
from array_record.python import array_record_module

from lightclip_jax.data import captions, manifest, processes, records, sources, tokenizers, transforms, writer
from lightclip_jax.data.faults import REASONS, BadRecord
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources.array_record import ArrayRecordSource
from lightclip_jax.errors import UserError

SUMMARY_FILE, SHEET_FILE = 'summary.txt', 'contact_sheet.jpg'
_NOTE, _PLAN = '.note.json', 'plan.json'
_SAMPLE_A_PART = 2000          # records at most whose captions the tokenizer learns from
_MOST_CAPTIONS = 64            # of an image and its copies: one that says "no image here" may have a copy a second record
_COLUMNS = ('hashes', 'captions', 'concepts', 'sides', 'words')
_SHEET, _TILE = 8, 96          # pictures in a row, pixels of each
_JPEG_SIDE = 65_500            # pixels at most, libjpeg's limit


@dataclasses.dataclass(frozen=True)
class Options:
  """What becomes of the records."""
  size: int = 0                # shorter side in pixels at most; 0: images stay as they are
  quality: int = 90            # of JPEGs that are made anew
  duplicates: Literal['keep', 'exact', 'similar'] = 'exact'
  max_pixels: int = transforms.MAX_PIXELS
  vocab_size: int = 8192
  tokenizer: str = ''          # a file; '': one is trained


def convert(about: dict[str, Any], out: pathlib.Path, options: Options, workers: int) -> manifest.Manifest:
  """Makes the prepared folder `out` of the sources that `about` names (`sources.open_parts`).

  Raises:
    UserError: if a source or the tokenizer is not there, no record can be used, or `out` cannot be written or holds what was
      prepared otherwise, or of a source that has changed since.
  """
  asked = _asked(about, options)
  with writer.new_folder(out, keep=True) as folder:
    if folder is not None:
      tokenizer = tokenizers.load(options.tokenizer) if options.tokenizer else None   # first: a mistake in it costs nothing
      work = Work(about, folder, options)
      work.clear_if_other()
      notes = {split: work.run(split, workers) for split in work.splits}
      _leave_out_duplicates(folder, notes, options.duplicates)
      _check_usable(folder, _name(about), notes)
      _finish(folder, {**asked, 'fingerprint': work.fingerprint}, notes, options, tokenizer)
  made = manifest.load(out)
  _check(out, made, asked)
  if folder is None:
    _check_unchanged(out, made, about)
  return made


def _name(about: dict[str, Any]) -> str:
  return ' + '.join(f'{part["kind"]}:{part["path"]}' for part in about['parts'])


def _asked(about: dict[str, Any], options: Options) -> dict[str, Any]:
  """What decides the contents of a prepared folder, as a JSON value; the sources need not be there any more."""
  columns = {name: ' + '.join(part[name] for part in about['parts'])
             for name in ('image_column', 'caption_column', 'image_root')}
  return {'source': _name(about), 'holdout_every': about['holdout_every'], **columns, **dataclasses.asdict(options)}


def _check(out: pathlib.Path, made: manifest.Manifest, asked: dict[str, Any]) -> None:
  """Raises UserError if the folder was there already, and prepared otherwise than is asked for now."""
  held = made.asked
  if not held:
    every = (asked['holdout_every'] or '?') if sources.HELDOUT in made.splits else 0
    held = {'source': made.name, 'size': made.image_size, 'holdout_every': every}
  other = [f'{name}={value!r} (not {asked[name]!r})' for name, value in held.items() if value != asked.get(name, value)]
  if other:
    raise UserError(f'{str(out)!r} holds {made.name!r}, prepared with {", ".join(other)}; delete it or give another --out')


def _check_unchanged(out: pathlib.Path, made: manifest.Manifest, about: dict[str, Any]) -> None:
  """Raises UserError if the source is still there, but not as it was when the folder was prepared."""
  held = made.asked.get('fingerprint')   # None where an older version made it
  try:
    changed = held is not None and sources.open_parts(about, 'train').fingerprint != held
  except UserError:   # nobody needs it any more
    return
  if changed:
    raise UserError(f'{str(out)!r} was prepared before {_name(about)!r} changed; delete it or give another --out')


def _check_usable(folder: pathlib.Path, name: str, notes: dict[str, list[dict[str, Any]]]) -> None:
  """Raises UserError if a split has no records, and says why: a run would fail at its first evaluation, hours later."""
  for split, parts in notes.items():
    if any(note['count'] for note in parts):
      continue
    # What is mended, such as captions that are put beside their images, may not change the fingerprint: all is looked at anew.
    (folder / _PLAN).unlink()
    reasons = _reasons(_left_out(parts))
    what, mend = ('trained on', '') if split == 'train' else ('held out', '; give another --holdout_every')
    raise UserError(f'no record of {name!r} can be {what}: {reasons or "there is none"}{mend}')


class Work:
  """The parts of one preparation."""

  def __init__(self, about: dict[str, Any], folder: pathlib.Path, options: Options):
    self.splits = ('train', sources.HELDOUT) if about['holdout_every'] else ('train',)
    self._about, self._folder, self._options = about, folder, options
    self._sources = {split: sources.open_parts(about, split) for split in self.splits}
    self.fingerprint = self._sources['train'].fingerprint

  def clear_if_other(self) -> None:
    """Throws away what another source or other options, those of the tokenizer aside, left in the folder."""
    # One of too few pieces for the captions' letters is only found at the end, and no shard depends on it.
    decisive = dataclasses.asdict(dataclasses.replace(self._options, vocab_size=0, tokenizer=''))
    plan = json.dumps([self.fingerprint, decisive, self._about], sort_keys=True)
    file = self._folder / _PLAN
    if not file.is_file() or file.read_text() != plan:
      for leftover in self._folder.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
      file.write_text(plan)

  def run(self, split: str, workers: int) -> list[dict[str, Any]]:
    """The notes of all parts of a split, in order; those that are not there are made."""
    source = self._sources[split]
    starts = range(0, len(source), writer.RECORDS_PER_SHARD)
    shards = [f'{split}-{number:05d}.array_record' for number in range(len(starts))]
    missing = [(start, min(start + writer.RECORDS_PER_SHARD, len(source)), shard)
               for start, shard in zip(starts, shards, strict=True) if not (self._folder / (shard + _NOTE)).is_file()]
    done = len(source) - sum(stop - start for start, stop, _ in missing)
    job = functools.partial(_part, source, self._folder, self._options)
    with tqdm.tqdm(total=len(source), initial=done, desc=f'preparing {split}', unit=' pairs', mininterval=0.5) as bar:
      for count in _each(job, missing, workers):
        bar.update(count)
    return [json.loads((self._folder / (shard + _NOTE)).read_text()) for shard in shards]


def _each(job: Callable, items: list[Any], workers: int) -> Iterator[int]:
  if workers <= 1 or len(items) < 2:
    yield from map(job, items)
    return
  others = multiprocessing.active_children()
  pool = concurrent.futures.ProcessPoolExecutor(
      workers, multiprocessing.get_context('spawn'), processes.start_worker, (os.getpid(),))
  with pool:
    try:
      for future in concurrent.futures.as_completed([pool.submit(job, item) for item in items]):
        yield future.result()
    except concurrent.futures.BrokenExecutor as error:
      raise UserError('a process that prepares was killed, by hand or for want of memory (fewer --processes need less); start '
                      'the same command again: it goes on where it was') from error
    except BaseException:   # nobody waits for parts that have begun: they take minutes, and are made anew anyway
      for child in multiprocessing.active_children():
        if child not in others:
          child.terminate()
      raise


def _part(source: sources.Source, folder: pathlib.Path, options: Options, item: tuple[int, int, str]) -> int:
  """Writes one shard and its note; returns how many records were looked at."""
  start, stop, shard = item
  step = -(-(stop - start) // _SAMPLE_A_PART)   # the first ones alone would be of the first class, where classes lie in order
  note: dict[str, Any] = {'shard': shard, 'left_out': {}, **{name: [] for name in _COLUMNS}}
  with contextlib.closing(writer.Shard(folder / (shard + '.partial'))) as file:
    for index in range(start, stop):
      try:
        record, image = _cleaned(source[index], options)
      except BadRecord as error:
        note['left_out'][error.reason] = note['left_out'].get(error.reason, 0) + 1
        continue
      file.write(records.encode(record))
      if len(note['sides']) % step == 0:
        note['captions'].extend(record.captions)
      _remember(note, record, image, options.duplicates)
  note['count'], note['concepts'] = len(note['sides']), sorted(set(note['concepts']))
  (folder / (shard + '.partial')).replace(folder / shard)
  _write_whole(folder / (shard + _NOTE), json.dumps(note))
  return stop - start


def _cleaned(record: Record, options: Options) -> tuple[Record, np.ndarray]:
  """The record as it is stored, and its image uint8 [H, W, 3]. Raises BadRecord."""
  image = transforms.decode(record.image, options.max_pixels)
  texts = _clean_texts(record.captions)
  encoded, shorter = record.image, min(image.shape[:2])
  height, width = (max(1, round(side * options.size / shorter)) for side in image.shape[:2])
  if 0 < options.size < shorter and max(height, width) <= _JPEG_SIDE:   # one that is longer stays as it is
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), options.quality)
  return dataclasses.replace(record, image=encoded, captions=texts), image


def _clean_texts(texts: tuple[str, ...]) -> tuple[str, ...]:
  """Raises BadRecord if none is left."""
  return captions.of_value([captions.clean(text) for text in texts])


def _remember(note: dict[str, Any], record: Record, image: np.ndarray, duplicates: str) -> None:
  note['sides'].append(min(image.shape[:2]))
  note['words'].append(len(record.captions[0].split()))
  note['hashes'].append(difference_hash(image) if duplicates == 'similar' else _exact(record.image))
  if record.concept:
    note['concepts'].append(record.concept)


def _exact(image: bytes) -> str:
  return hashlib.sha256(image).hexdigest()[:32]


def difference_hash(image_HxWx3: np.ndarray) -> str:
  """64 bits, as 16 hexadecimal digits: whether brightness rises from pixel to pixel at 9 x 8.

  N. Krawetz, "Kind of like that" (2013). Flat pictures, of which it would say nothing, have a longer hash of their pixels.
  """
  small = cv2.resize(cv2.cvtColor(image_HxWx3, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
  if np.ptp(small) < 8:
    return hashlib.sha256(image_HxWx3.tobytes()).hexdigest()
  return np.packbits(np.diff(small, axis=1) > 0).tobytes().hex()


class Seen:
  """Hashes that were there before: equal ones, and of difference hashes those that differ in 3 bits at most."""

  def __init__(self) -> None:
    self._whole: set[str] = set()
    self._bands: dict[tuple[int, str], array.array] = collections.defaultdict(lambda: array.array('Q'))

  def add(self, value: str) -> bool:
    """Whether `value` is new."""
    if value in self._whole:
      return False
    if len(value) == 16:   # of four bands at least one is equal where 3 bits differ
      number, bands = int(value, 16), [self._bands[band, value[4 * band:4 * band + 4]] for band in range(4)]
      if any(_is_similar(number, band) for band in bands):
        return False
      for band in bands:
        band.append(number)
    self._whole.add(value)
    return True


def _is_similar(number: int, others: array.array) -> bool:
  # All at once: pictures with the same rows, such as a white top, share a band by the hundred thousand.
  return bool((np.bitwise_count(np.frombuffer(others, np.uint64) ^ np.uint64(number)) <= 3).any()) if others else False


def _leave_out_duplicates(folder: pathlib.Path, notes: dict[str, list[dict[str, Any]]], how: str) -> None:
  """Rewrites the shards that repeat what came before; the first of several stays, those in `train` before all others.

  It takes over the captions of its exact copies: a table may have a row for each caption of an image.
  """
  if how == 'keep':
    return
  seen = Seen()
  every = [note for parts in notes.values() for note in parts]
  shown = functools.partial(tqdm.tqdm, total=len(every), unit=' parts', mininterval=0.5)   # of millions each takes minutes
  keeps = [[seen.add(value) for value in note['hashes']] for note in shown(every, 'comparing')]
  texts = _texts_of_copies(folder, every, keeps)
  repeated = {value for note, keep in zip(every, keeps, strict=True)
              for value, kept in zip(note['hashes'], keep, strict=True) if not kept}
  for note, keep in shown(zip(every, keeps, strict=True), 'leaving out copies'):
    if repeated.isdisjoint(note['hashes']):
      continue
    _rewrite(folder / note['shard'], keep, texts)
    note['left_out']['duplicate'] = note['left_out'].get('duplicate', 0) + keep.count(False)
    for name in ('hashes', 'sides', 'words'):
      note[name] = list(itertools.compress(note[name], keep))
    note['count'] = len(note['hashes'])
    _write_whole(folder / (note['shard'] + _NOTE), json.dumps(note))


def _texts_of_copies(folder: pathlib.Path, notes: list[dict[str, Any]], keeps: list[list[bool]]) -> dict[str, list[str]]:
  """By `_exact` of the image, captions of the records that are left out."""
  texts: dict[str, list[str]] = {}
  for note, keep in zip(notes, keeps, strict=True):
    if all(keep):
      continue
    with _shard_reader(folder / note['shard']) as shard:
      if shard.num_records() == sum(keep):   # one that was killed has rewritten it, and all before it
        continue
      for index in np.flatnonzero(np.logical_not(keep)):
        record = records.decode(shard.read([int(index)])[0])
        found = texts.setdefault(_exact(record.image), [])
        found.extend(record.captions[:_MOST_CAPTIONS - len(found)])
  return texts


def _rewrite(shard: pathlib.Path, keep: list[bool], texts: dict[str, list[str]]) -> None:
  """Leaves these records in a shard, with more captions, unless one that was killed before it wrote the note has done so."""
  with _shard_reader(shard) as old:
    if old.num_records() == sum(keep) < len(keep):
      return
    partial = shard.with_name(shard.name + '.partial')
    with contextlib.closing(writer.Shard(partial)) as file:
      for index in np.flatnonzero(keep):
        record = records.decode(old.read([int(index)])[0])
        more = texts.get(_exact(record.image), [])[:max(0, _MOST_CAPTIONS - len(record.captions))]
        together = tuple(dict.fromkeys((*record.captions, *more)))
        file.write(records.encode(dataclasses.replace(record, captions=together)))
  partial.replace(shard)


def captions_of(source: sources.Source, step: int) -> Iterator[str]:
  """All captions of each `step`-th record, cleaned; what cannot be used is left out, and images are not read.

  Raises:
    UserError: if there are none, after the last record, with the reasons.
  """
  left_out, some = collections.Counter(), False
  for index in tqdm.trange(0, len(source), max(1, step), desc='reading captions', mininterval=0.5):
    try:
      texts = _clean_texts(captions.at(source, index))
    except BadRecord as error:
      left_out[error.reason] += 1
      continue
    some = True
    yield from texts
  if not some:
    raise UserError(f'a tokenizer needs captions to learn from; there are none: {_reasons(left_out) or "no record at all"}')


def _finish(folder: pathlib.Path, asked: dict[str, Any], notes: dict[str, list[dict[str, Any]]], options: Options,
            tokenizer: tokenizers.Tokenizer | None) -> None:
  """Tokenizer, summary, contact sheet and manifest; last, the notes are deleted."""
  texts = [text for note in notes['train'] for text in note['captions']]
  tokenizer = tokenizer or tokenizers.train(texts, options.vocab_size)
  file = f'tokenizer{tokenizer.suffix}'
  (folder / file).write_bytes(tokenizer.to_bytes())
  splits = {split: manifest.Split(tuple(note['shard'] for note in parts if note['count']), sum(note['count'] for note in parts))
            for split, parts in notes.items()}
  every = [note for parts in notes.values() for note in parts]
  files = [file, *(shard for split in splits.values() for shard in split.shards)]
  name = asked['source']
  contents = manifest.Manifest(
      name=name, splits=splits, tokenizer=file, image_size=options.size, groups=(), licences={}, packages={},
      asked=asked, concepts=tuple(sorted({concept for note in every for concept in note['concepts']})),
      sha256={name: writer.sha256(folder / name) for name in files})
  (folder / SUMMARY_FILE).write_text(summary(name, splits, every), encoding='utf-8')
  contents.save(folder)
  _contact_sheet(ArrayRecordSource(folder, 'train'), folder / SHEET_FILE, options.max_pixels)
  for leftover in [*(folder / (note['shard'] + _NOTE) for note in every), folder / _PLAN,
                   *(folder / note['shard'] for note in every if not note['count'])]:
    leftover.unlink(missing_ok=True)


def summary(name: str, splits: dict[str, manifest.Split], notes: list[dict[str, Any]]) -> str:
  """What a person wants to know of a prepared set, as text."""
  lines = [name, *(f'{split}: {contents.count:,} pairs' for split, contents in splits.items())]
  lines += ['left out:', *(f'  {count:>9,} {reason} ({REASONS[reason]})' for reason, count in _left_out(notes).items())]
  for title, key in (('shorter side, pixels', 'sides'), ('words of the first caption', 'words')):
    lines += ['', f'{title}:', *_histogram([value for note in notes for value in note[key]])]
  return '\n'.join(lines) + '\n'


def _left_out(notes: list[dict[str, Any]]) -> dict[str, int]:
  """How many records, by reason."""
  counts = {reason: sum(note['left_out'].get(reason, 0) for note in notes) for reason in REASONS}
  return {reason: count for reason, count in counts.items() if count}


def _reasons(counts: dict[str, int]) -> str:
  return ', '.join(f'{count:,} {reason} ({REASONS[reason]})' for reason, count in counts.items())


def _histogram(values: list[int]) -> Iterator[str]:
  counts, edges = np.histogram(values, bins=min(10, max(1, len(set(values)))))
  for count, low, high in zip(counts, edges, edges[1:], strict=False):
    yield f'  {low:7.0f} to {high:5.0f} {count:>9,} ' + '#' * round(40 * count / max(1, counts.max()))


def _contact_sheet(source: sources.Source, file: pathlib.Path, max_pixels: int) -> None:
  """Pictures from all over the set."""
  sheet = np.full((_SHEET * _TILE, _SHEET * _TILE, 3), 255, np.uint8)
  for place, index in enumerate(np.linspace(0, len(source) - 1, min(len(source), _SHEET ** 2)).astype(int)):
    row, column = (number * _TILE for number in divmod(place, _SHEET))
    image = transforms.decode(source[index].image, max_pixels)
    scale = _TILE / max(image.shape[:2])
    height, width = (max(1, int(side * scale)) for side in image.shape[:2])
    sheet[row:row + height, column:column + width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
  file.write_bytes(simplejpeg.encode_jpeg(sheet))


def _shard_reader(file: pathlib.Path) -> contextlib.closing:
  return contextlib.closing(array_record_module.ArrayRecordReader(str(file)))


def _write_whole(file: pathlib.Path, text: str) -> None:
  partial = file.with_name(file.name + '.partial')
  partial.write_text(text)
  partial.replace(file)
