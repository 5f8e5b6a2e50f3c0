"""Mutated tars, tables, Parquet files and images: each must give records, clean skips or one line, and open nothing outside.

COMMAND  python -m benchmarks.fuzz --inputs=25000 --seed=0
Prints one line of JSON: how many inputs of each format, and what became of their records. Any other error is a failure, which
Hypothesis makes small and shows. Some run in the tests, too (tests/data/test_data_faults.py).
"""
import argparse
import collections
import io
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import PIL.Image
from hypothesis import strategies as st

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'tests/data'))
import source_files  # noqa: E402  (the path above must be set first)

from lightclip_jax import cli  # noqa: E402
from lightclip_jax.data import faults, sources, transforms  # noqa: E402
from lightclip_jax.data.faults import BadRecord  # noqa: E402
from lightclip_jax.errors import UserError  # noqa: E402

SOURCES = ('webdataset', 'csv', 'jsonl', 'parquet')
FORMATS = (*SOURCES, 'image')
MAX_PIXELS = 1 << 20
_BLOCK = 512                   # of a tar
_CODE = ('.py', '.pyc', '.so')    # modules that are imported late may lie anywhere
_TOKENS = [b'../secret.jpg', b'/etc/passwd', b'link.jpg', b'../', b'file:///etc/passwd', b'99 path=../secret.jpg\n',
           b'\0', b'"', b'""', b',', b'\t', b'\r\n', b'\n', b'{', b'[', b'}', b'null', b'\\ud800', b'\xff\xfe', b'\xef\xbb\xbf',
           b'\xff' * 8, b'\0' * 8, b'\x7f\xff\xff\xff', b'1', b'2', b'L', b'x', b'77777777777', b'Exif\0\0']
# (where, how, bytes): written over what is there, put between, or all behind it cut off.
EDITS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(['over', 'over', 'between', 'cut']),
                           st.sampled_from(_TOKENS) | st.binary(min_size=1, max_size=6)), min_size=1, max_size=6)


def mutated(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
  """`data` after `edits`, one after the other."""
  out = bytearray(data)
  for place, how, new in edits:
    at = int(place * len(out))
    if how == 'cut':
      del out[at:]
    else:
      out[at:at + (len(new) if how == 'over' else 0)] = new
  return bytes(out)


def mended(tar: bytes, original: bytes) -> bytes:
  """`tar` with right sums in the headers that lie where those of `original` did, so that more than the sum is looked at."""
  out = bytearray(tar)
  for at in range(0, len(out) - _BLOCK + 1, _BLOCK):
    if original[at + 257:at + 262] == b'ustar':
      out[at + 148:at + 156] = b' ' * 8
      out[at + 148:at + 156] = b'%06o\0 ' % sum(out[at:at + _BLOCK])
  return bytes(out)


class Watch:
  """Which files are opened while it looks, of those that are neither below `allowed` nor code."""

  def __init__(self) -> None:
    self.allowed: tuple[str, ...] | None = None
    self.outside: list[str] = []
    sys.addaudithook(self._see)   # it cannot be taken away again

  def _see(self, event: str, args: tuple[Any, ...]) -> None:
    if event == 'open' and self.allowed and isinstance(args[0], (str, bytes, os.PathLike)):
      path = os.path.realpath(os.fsdecode(args[0]))
      if not path.startswith(self.allowed) and not path.endswith(_CODE):
        self.outside.append(path)


class Sandbox:
  """A folder with one file of a format, a link that leads out of it, and a secret beside it."""

  def __init__(self, kind: str, root: pathlib.Path):
    self.kind, self._inside, self._index = kind, root / 'inside', root / 'index'
    self._inside.mkdir()
    (root / 'secret.jpg').write_bytes(source_files.jpeg(9))
    (self._inside / 'link.jpg').symlink_to(root / 'secret.jpg')
    source_files.WRITERS[kind](self._inside, source_files.pairs(4))
    self._file = next(file for file in sorted(self._inside.iterdir()) if file.is_file() and not file.is_symlink())
    self._data = self._file.read_bytes()
    self.allowed = tuple(os.path.realpath(path) + '/' for path in (self._inside, self._index))

  def outcomes(self, edits: list[tuple[float, str, bytes]], mend: bool) -> list[str]:
    """'good', a reason of each record, or 'refused'."""
    data = mutated(self._data, edits)
    self._file.write_bytes(mended(data, self._data) if mend and self.kind == 'webdataset' else data)
    path = self._inside if self.kind == 'webdataset' else self._file
    try:
      source = sources.SOURCES[self.kind](sources.Spec(self.kind, str(path), index=str(self._index)))
    except UserError as error:
      assert '\n' not in str(error)
      return ['refused']
    return [_outcome(lambda i=i: transforms.decode(source[i].image, MAX_PIXELS), source.name(i)) for i in range(len(source))]


class Images:
  """Pictures of every usual encoding, decoded whole and for a crop."""
  allowed = ('/nothing/',)

  def __init__(self) -> None:
    image, exif = PIL.Image.open(io.BytesIO(source_files.jpeg(3))), PIL.Image.Exif()
    exif[0x112] = 6
    options: list[tuple[str, dict[str, Any]]] = [
        ('JPEG', {}), ('JPEG', {'progressive': True}), ('JPEG', {'exif': exif}), ('PNG', {}), ('WEBP', {}), ('GIF', {}),
        ('WEBP', {'lossless': True, 'exif': exif}), ('BMP', {}), ('TIFF', {})]
    self._encoded = [self._encode(image, kind, more) for kind, more in options]
    self._encoded.append(self._encode(image.convert('CMYK'), 'JPEG', {}))

  def _encode(self, image: PIL.Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()

  def outcomes(self, edits: list[tuple[float, str, bytes]], mend: bool) -> list[str]:
    """As `Sandbox.outcomes`, of one picture; `mend` crops it."""
    kind = int(edits[0][0] * 1e6) % len(self._encoded)
    data = mutated(self._encoded[kind], edits)
    crop = lambda: transforms.decode_crop(  # noqa: E731
        data, 8, np.random.default_rng(0), scale=(0.3, 1), ratio=(0.7, 1.4), max_pixels=MAX_PIXELS)
    return [_outcome(crop if mend else lambda: transforms.decode(data, MAX_PIXELS))]


def _outcome(read: Callable[[], np.ndarray], name: str = '-') -> str:
  assert name
  try:
    image = read()
  except BadRecord as error:
    assert error.reason in faults.REASONS and '\n' not in str(error)
    return error.reason
  assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and 0 < image.size <= 3 * MAX_PIXELS
  return 'good'


WATCH = Watch()


def run(kind: str, inputs: int, seed: int) -> dict[str, int]:
  """What became of the records of `inputs` mutated files of a format; raises whatever else went wrong, or AssertionError."""
  counts: collections.Counter[str] = collections.Counter()
  with tempfile.TemporaryDirectory() as root:
    target = Images() if kind == 'image' else Sandbox(kind, pathlib.Path(root))
    target.outcomes([(1.0, 'between', b'')], False)   # what is imported late is imported now

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(EDITS, st.booleans())
    def each(edits: list[tuple[float, str, bytes]], mend: bool) -> None:
      WATCH.outside, WATCH.allowed = [], target.allowed
      try:
        outcomes = target.outcomes(edits, mend)
      finally:
        WATCH.allowed = None
      assert not WATCH.outside, f'opened {WATCH.outside}'
      counts.update(inputs=1, **collections.Counter(outcomes))

    each()
  return dict(counts)


def main() -> None:
  """Fuzzes all formats and prints the counts."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--inputs', type=cli.positive, default=25_000, help='of all formats together')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  start = time.perf_counter()
  result: dict[str, Any] = {kind: run(kind, -(-args.inputs // len(FORMATS)), args.seed) for kind in FORMATS}
  total = sum(counts['inputs'] for counts in result.values())
  print(json.dumps({'inputs': total, 'seed': args.seed, 'seconds': round(time.perf_counter() - start), **result}))


if __name__ == '__main__':
  sys.exit(cli.run(main))
