"""Records to batches (Grain): a global shuffle without epoch boundaries, the same on any number of workers and hosts.

Example n of the global order is record `shuffle(n)`; batch m is examples [m B, (m + 1) B), of which host h takes its
contiguous share. All that is random in an example follows from (seed, record, epoch), so the whole state is the number
of the next batch.

Letters: B global batch, b batch of this host, S image size, W text positions, K masked positions.
"""
import collections
import concurrent.futures
import functools
import hashlib
import json
import os
import re
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from lightclip_jax import config as configs
from lightclip_jax import storage
from lightclip_jax.data import faults, manifest, masking, processes, rand_augment, sources, tokenizers, transforms
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources import mixture
from lightclip_jax.data.teacher import Teacher
from lightclip_jax.errors import UserError

Batch = dict[str, np.ndarray]
_STARTS = 3   # of workers, for one batch


class _Example:
  """Makes an example of (record index, epoch). Picklable, and a pure function of its arguments."""

  def __init__(self, source: sources.Source, tokenizer: tokenizers.Tokenizer, options: configs.Data, image_size: int,
               context: int, seed: int):
    self._source, self._tokenizer, self._options = source, tokenizer, options
    self._image_size, self._context, self._seed = image_size, context, seed

  def __call__(self, position: int) -> Batch:
    epoch, index = divmod(position, len(self._source))
    entropy, left_out = (self._seed, index, epoch), faults.blank()
    for attempt in range(faults.ATTEMPTS):
      try:
        return {**self._make(index, entropy), 'faults': left_out}
      except BadRecord as error:
        left_out[attempt], failed = faults.entry(index, error), error
        # Another record, which follows from the place of the one that it replaces: batches stay full and resumable.
        entropy = (self._seed, position, attempt, faults.ATTEMPTS)
        part = mixture.part_of(self._source, index)   # whose share of a mixture stays what it is
        index = int(np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).integers(*part))
    raise UserError(f'{faults.ATTEMPTS} records in a row cannot be used; the first was '
                    f'{self._source.name(int(left_out[0, 0]))}, the last: {failed}')

  def _make(self, index: int, entropy: tuple[int, ...]) -> Batch:
    # What is mixed is drawn apart, so that what is not is the same with mosaics and without.
    rng, mixing = (np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy, spawn_key=key))) for key in ((), (0,)))
    record = self._source[index]
    image = self._image(record, self._image_size, rng)
    number, caption = self._caption(record, rng)
    if self._options.mosaic and mixing.random() < self._options.mosaic:
      image, caption = self._mosaic(image, caption, index, mixing)
    return {'image': image, **self._text(caption, rng), 'caption_number': np.int32(number),   # among the record's own
            'example_id': np.int64(index)}

  def _image(self, record: Record, size: int, rng: np.random.Generator) -> np.ndarray:
    options = self._options
    image = transforms.decode_crop(record.image, size, rng, scale=options.crop_scale, ratio=options.crop_ratio,
                                   max_pixels=options.max_pixels)
    image = transforms.color_jitter(transforms.flip(image, rng, options.flip), rng, options.color_jitter)
    return rand_augment.rand_augment(image, rng, options.rand_augment, options.rand_augment_strength)

  def _caption(self, record: Record, rng: np.random.Generator) -> tuple[int, str]:
    if not record.captions:
      raise BadRecord('no_caption')
    number = 0 if rng.random() < self._options.first_caption else int(rng.integers(len(record.captions)))
    return number, record.captions[number]

  def _mosaic(self, image: np.ndarray, caption: str, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """An example among one to three others of its part of a mixture: pictures in the cells of a grid, captions joined.

    Others whose caption the context would cut are left out, and those that cannot be used, which are counted in their own turn.
    """
    size, images, captions = self._image_size // transforms.GRID, [], [caption]
    start, end = mixture.part_of(self._source, index)
    for other in rng.integers(start, end, size=rng.integers(1, transforms.GRID ** 2)):
      try:
        record = self._source[int(other)]
        place, (_, said) = rng.integers(len(captions) + 1), self._caption(record, rng)
        joined = [*captions[:place], said, *captions[place:]]
        if tokenizers.fits(self._tokenizer, ' and '.join(joined), self._context):
          images.append(self._image(record, size, rng))
          captions = joined
      except BadRecord:
        continue
    if not images:
      return image, caption
    images.append(transforms.resize(image, size))
    cells = [divmod(int(cell), transforms.GRID) for cell in rng.permutation(transforms.GRID ** 2)[:len(images)]]
    return transforms.mosaic(images, cells, self._image_size), ' and '.join(captions)

  def _text(self, caption: str, rng: np.random.Generator) -> Batch:
    tokenizer = self._tokenizer
    tokens_W = tokenizer.encode([caption], self._context)[0]
    word_mask_W = tokenizer.word_mask(tokens_W)
    masked_W, positions_K, labels_K, weights_K = masking.mask_words(
        tokens_W, word_mask_W, rng, fraction=self._options.mask_fraction, max_masked=self._options.max_masked,
        mask_id=tokenizer.mask_id, vocab_size=tokenizer.vocab_size, special_ids=tokenizer.special_ids)
    return {
        'tokens': tokens_W, 'word_mask': word_mask_W, 'masked_tokens': masked_W, 'masked_positions': positions_K,
        'masked_labels': labels_K, 'masked_weights': weights_K,
        'caption_id': np.int32(zlib.crc32(tokens_W.tobytes()) & 0x7fffffff),   # equal captions, equal ids
    }


class _Share(grain.MapDataset):
  """What one host reads of the global order, from batch `first` on."""

  def __init__(self, parent: grain.MapDataset, batch_size: int, process_index: int, process_count: int, first: int):
    super().__init__(parent)
    self._share = batch_size // process_count
    self._batch_size, self._offset = batch_size, first * batch_size + process_index * self._share

  def __len__(self) -> int:
    return len(self._parent)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, within = divmod(index, self._share)
    return self._parent[self._offset + batch * self._batch_size + within]


def train_dataset(folder: str | storage.Path, options: configs.Data, *, image_size: int, context: int, batch_size: int,
                  seed: int, process_index: int = 0, process_count: int = 1, with_teacher: bool = False,
                  first_batch: int = 0) -> grain.IterDataset:
  """The endless training batches of one host, from batch `first_batch` on, as a Grain dataset. See `train_batches`."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f'train.batch_size is {batch_size}; it must be a multiple of the {process_count} hosts')
  if options.rand_augment < 0 or not 0 <= options.rand_augment_strength <= 1:
    raise UserError(f'data.rand_augment is {options.rand_augment} and its strength {options.rand_augment_strength}; they must '
                    'be a number of operations and 0 to 1')
  if not 0 <= options.mosaic <= 1 or (options.mosaic and with_teacher):
    raise UserError(f'data.mosaic is {options.mosaic}; it must be 0 to 1, and 0 with a teacher, who has not seen the mosaics')
  source = sources.open_split(folder, 'train')
  if not len(source):
    raise UserError(f'data folder {str(folder)!r} has no training records')
  example = _Example(source, load_tokenizer(folder), options, image_size, context, seed)
  share = _Share(_order(source, seed), batch_size, process_index, process_count, first_batch)
  examples = share.map(example).map(Teacher(folder)) if with_teacher else share.map(example)
  batches = examples.batch(batch_size // process_count)
  workers = worker_count(options.workers)
  threads = 1 if workers else max(1, min(16, os.cpu_count() or 1))
  dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=options.prefetch))
  if not workers:
    return dataset
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()   # Grain reads absl flags before it starts workers, also in programs without absl
  parallel = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=options.prefetch)
  return dataset.mp_prefetch(parallel, functools.partial(_start_worker, os.getpid()))


def _order(source: sources.Source, seed: int) -> grain.MapDataset:
  """Positions, which keep counting over the epochs, so that an example knows its epoch; each epoch has its own order."""
  if not getattr(source, 'weights', ()):
    return _shuffled(len(source), seed)
  # Each part has its own epochs. A position still is (epoch, record), of the records of all parts.
  parts = [_shuffled(len(part), (seed, number)).map(_Place(len(part), start, len(source)))
           for number, (part, start) in enumerate(zip(source.parts, source.starts[:-1], strict=True))]
  return grain.MapDataset.mix(parts, weights=[weight / sum(source.weights) for weight in source.weights])


def _shuffled(count: int, seed: int | tuple[int, int]) -> grain.MapDataset:
  positions = grain.MapDataset.range(count).map_with_index(_position)
  return positions.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0])).repeat()


def _position(index: int, _: int) -> int:
  return index


class _Place:
  """The position of a part's example among those of all parts. Picklable."""

  def __init__(self, count: int, start: int, total: int):
    self._count, self._start, self._total = count, start, total

  def __call__(self, position: int) -> int:
    epoch, index = divmod(position, self._count)
    return epoch * self._total + self._start + index


def _start_worker(parent: int, worker: int, workers: int) -> None:
  del worker, workers
  processes.start_worker(parent)


def worker_count(workers: int) -> int:
  """Decoding processes for `data.workers`; 0 means threads.

  -1: threads on up to 4 cores (decoding and resizing release the GIL), else all cores but one, 16 at most.
  """
  cores = os.cpu_count() or 1
  return workers if workers >= 0 else 0 if cores <= 4 else min(16, cores - 1)


def load_tokenizer(folder: str | storage.Path) -> tokenizers.Tokenizer:
  """The tokenizer that lies in a prepared folder."""
  return tokenizers.load(storage.path(folder) / manifest.load(folder).tokenizer)


class TrainBatches(Iterator[Batch]):
  """Endless batches whose place is one number; made by `train_batches`."""

  def __init__(self, folder: str | storage.Path, options: configs.Data, arguments: Mapping[str, Any]):
    self._folder, self._options, self._arguments = folder, options, dict(arguments)
    self._fingerprint = _fingerprint(folder, self._arguments['with_teacher'])
    self._next_batch = 0
    self._running: list[grain.DatasetIterator] = []      # one, or none before the first batch and after `close`
    # At the end of the program too: Grain's iterators print tracebacks when they are torn down with the interpreter.
    weakref.finalize(self, _stop, self._running)
    train_dataset(folder, options, **self._arguments)   # what is wrong is said now, not with the first batch
    self._ledger = faults.Ledger(options.max_faults, sources.open_split(folder, 'train').name)

  def __next__(self) -> Batch:
    batch = self._read()
    self._next_batch += 1
    self._ledger.add(batch.pop('faults'))
    if not worker_count(self._options.workers):
      return batch
    # Copied out of the workers' shared memory, which complains when an array in it lives to the end of the program.
    return {name: np.array(values) for name, values in batch.items()}

  def _read(self) -> Batch:
    """The next batch; where a worker has died (it was killed, or memory was short), from new ones, up to `_STARTS` times."""
    for start in range(_STARTS):
      try:
        if not self._running:
          dataset = train_dataset(self._folder, self._options, **self._arguments, first_batch=self._next_batch)
          self._running.append(iter(dataset))
        return next(self._running[0])
      except (RuntimeError, OSError) as error:
        code = re.search(r'Worker process was terminated unexpectedly with exit code (-?\d+)', str(error))
        workers = worker_count(self._options.workers)
        if workers and (why := processes.short_of_memory(error, int(code[1]) if code else 0, workers * self._bytes_a_worker)):
          raise UserError(why) from error
        if not code:
          raise
        said = f'a data worker of process {self._arguments["process_index"]} died (exit code {code[1]}) before batch'
        if start + 1 == _STARTS:
          raise UserError(f'{said} {self._next_batch}, {_STARTS} times; see the log above, and the free memory') from error
        print(f'{said} {self._next_batch}; new ones start there', file=sys.stderr, flush=True)
        self.close()

  @property
  def _bytes_a_worker(self) -> int:
    """Of the images that one may hold at once: those that are ready, one that is made, one that is read."""
    share = self._arguments['batch_size'] // self._arguments['process_count']
    return (self._options.prefetch + 2) * share * self._arguments['image_size'] ** 2 * 3

  def faults(self) -> dict[str, int]:
    """How many records this host's batches had to leave out since the run began, by reason (`faults.REASONS`)."""
    return dict(self._ledger.counts)

  def state(self) -> dict[str, Any]:
    """The place of the next batch, as JSON values; equal on every host (but for faults), whatever the workers and hosts."""
    return {'next_batch': self._next_batch, 'seed': self._arguments['seed'],
            'batch_size': self._arguments['batch_size'], 'data': self._fingerprint, 'faults': self.faults()}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues at `state`, on any number of workers and hosts.

    Raises:
      UserError: if it is the state of other data, another seed or another global batch.
    """
    for name, own in self.state().items():
      if name not in ('next_batch', 'faults') and state.get(name) != own:
        raise UserError(f'the checkpoint was made with {name} {state.get(name)!r}, this run has {own!r}; '
                        'continue with the same, or start a new workdir')
    self.close()
    self._next_batch = int(state['next_batch'])
    self._ledger.counts = dict(state.get('faults', {}))

  def close(self) -> None:
    """Ends the workers; the next batch would start new ones."""
    _stop(self._running)


def _stop(running: list[grain.DatasetIterator]) -> None:
  while running:
    running.pop().close()


def train_batches(folder: str | storage.Path, options: configs.Data, *, image_size: int, context: int, batch_size: int,
                  seed: int, process_index: int = 0, process_count: int = 1, with_teacher: bool = False) -> TrainBatches:
  """Endless training batches of this host.

  Args:
    folder: a prepared data set (`datasets.resolve`).
    options: `config.data`.
    image_size: S, pixels.
    context: W.
    batch_size: B, over all hosts; this host's are b = B / `process_count`.
    seed: decides order, captions, crops and masks.
    process_index: this host.
    process_count: hosts.
    with_teacher: whether to add the embeddings of the folder's teacher, of dimension E.

  Returns:
    An iterator of dicts: `image` uint8 [b, S, S, 3], `tokens` int32 [b, W], `word_mask` bool [b, W], `masked_tokens`
    int32 [b, W], `masked_positions` and `masked_labels` int32 [b, K], `masked_weights` float32 [b, K], `caption_id`
    int32 [b] (equal for equal captions), `caption_number` int32 [b] (among the record's own), `example_id` int64 [b] (the
    record's index in the split); with a teacher `teacher_image` and `teacher_text` float16 [b, E].

  Raises:
    UserError: for a folder without training records or teacher, or a batch that the hosts cannot share.
  """
  return TrainBatches(folder, options, dict(
      image_size=image_size, context=context, batch_size=batch_size, seed=seed, process_index=process_index,
      process_count=process_count, with_teacher=with_teacher))


def evaluation_batches(folder: str | storage.Path, split: str, *, image_size: int, batch_size: int, process_index: int = 0,
                       process_count: int = 1, max_pixels: int = transforms.MAX_PIXELS) -> Iterator[Batch]:
  """All images of a split once, over all hosts together, in order. `max_pixels` as for `evaluation_records`.

  Yields:
    `image` uint8 [b, S, S, 3] and `index` int64 [b], the record's index in the split; -1 where a batch is padded.
    Every host yields the same number of batches.
  """
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f'evaluation.batch_size is {batch_size}; it must be a multiple of the {process_count} hosts')
  source, limit = sources.open_split(folder, split), _limit(folder, max_pixels)
  yield from padded_batches(lambda i: _usable(source, i, limit)[1], len(source), image_size=image_size,
                            batch_size=batch_size, process_index=process_index, process_count=process_count)


def padded_batches(read: Callable[[int], np.ndarray | None], count: int, *, image_size: int, batch_size: int,
                   process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
  """Batches as those of `evaluation_batches`, of the images that `read(0)` to `read(count - 1)` give: uint8 RGB [H, W, 3].

  Where it gives None for image i, which cannot be read, that is black and its index is -2 - i. Threads read and resize the
  next batch while one is used.
  """
  share = batch_size // process_count
  image = functools.partial(_image, read, image_size)
  with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
    waiting: collections.deque = collections.deque()
    for start in range(0, count, batch_size):
      first = start + process_index * share
      waiting.append((first, [pool.submit(image, i) for i in range(first, min(first + share, count))]))
      if len(waiting) > 1:
        yield _padded(*waiting.popleft(), share, image_size)
    while waiting:
      yield _padded(*waiting.popleft(), share, image_size)


def _image(read: Callable[[int], np.ndarray | None], size: int, index: int) -> np.ndarray | None:
  image_HxWx3 = read(index)
  return None if image_HxWx3 is None else transforms.evaluation_transform(image_HxWx3, size)


def _padded(first: int, images: list[concurrent.futures.Future], share: int, image_size: int) -> Batch:
  batch = {'image': np.zeros((share, image_size, image_size, 3), np.uint8), 'index': np.full(share, -1, np.int64)}
  for row, future in enumerate(images):
    image, index = future.result(), first + row
    batch['index'][row] = -2 - index if image is None else index
    if image is not None:
      batch['image'][row] = image
  return batch


def evaluation_records(folder: str | storage.Path, split: str, max_pixels: int = transforms.MAX_PIXELS,
                       most: int | None = None) -> list[Record]:
  """Every record of a split (the first `most`) in order, images left encoded: captions, concept, group and style by index.

  One that cannot be used is black and has an empty caption, so that it counts as a mistake; so is one with more pixels than
  `max_pixels` and than `prepare` let through.
  """
  source, limit = sources.open_split(folder, split), _limit(folder, max_pixels)
  with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
    return list(pool.map(lambda index: _usable(source, index, limit)[0], range(len(source))[:most]))


def _threads() -> int:
  return max(1, min(16, os.cpu_count() or 1))


def _limit(folder: str | storage.Path, max_pixels: int) -> int:
  contents = manifest.load(folder)
  if contents.source and (first := sources.prepared(contents.source)):   # whose splits are evaluated
    contents = manifest.load(first)
  return max(max_pixels, contents.max_pixels)


def _usable(source: sources.Source, index: int, max_pixels: int) -> tuple[Record, np.ndarray]:
  """The record, and its image uint8 RGB [H, W, 3]."""
  try:
    record = source[index]
    return record, transforms.decode(record.image, max_pixels)
  except BadRecord as error:
    print(f'evaluation counts {source.name(index)} as a mistake: {error}', file=sys.stderr, flush=True)
    return Record(f'{index}', transforms.BLACK, ('',)), transforms.decode(transforms.BLACK)


def _fingerprint(folder: str | storage.Path, with_teacher: bool) -> str:
  """Short hash of the training shards and the tokenizer, and of the teacher's embeddings where these are read."""
  contents = manifest.load(folder)
  hashes = [contents.sha256[file] for file in (*contents.split('train').shards, contents.tokenizer)]
  hashes += [Teacher(folder).sha256] if with_teacher else []
  return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
