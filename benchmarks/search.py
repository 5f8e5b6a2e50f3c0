"""Time of exact search, and of indexing beside what the image tower alone takes.

COMMAND  python -m benchmarks.search --model=deployed --pictures=DIR
Measured: see docs/SEARCH.md.
"""
import os

os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')   # before numpy: one core

import argparse  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402

from lightclip_jax import cli  # noqa: E402
from lightclip_jax.search import index, pictures, ranking, towers  # noqa: E402

VECTORS, DIM = 100_000, 512


def search(folder: pathlib.Path) -> float:
  """Median milliseconds of one query over a memory map."""
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(VECTORS, DIM)).astype(np.float32)
  np.save(folder / 'vectors.npy', vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
  mapped, seconds = np.load(folder / 'vectors.npy', mmap_mode='r'), []
  for row in range(20):
    query, start = np.array(mapped[row]), time.perf_counter()
    rows, _ = ranking.nearest(mapped, query, 20)
    seconds.append(time.perf_counter() - start)
    assert rows[0] == row
  return 1000 * statistics.median(seconds)


def rates(model: pathlib.Path, folder: pathlib.Path, processes: int) -> dict[str, float]:
  """Pictures a second: of the index with its processes started (they are told by the difference of two sizes), and of the
  tower alone on pixels that are ready, on one thread and on as many as the index has processes."""
  export = towers.Export(model)
  files, _ = pictures.find(folder)

  def seconds(of: list[index.File]) -> float:
    start = time.perf_counter()
    assert sum(len(part[0]) for part in index._embed(folder, of, export, processes)) == len(of)
    return time.perf_counter() - start
  few = 64 * processes
  indexed = (len(files) - few) / (seconds(files) - seconds(files[:few]))
  pixels = np.stack([pictures.read(folder / path, export.size) for path, _, _ in files[:512]])
  out_rates = {'indexed': indexed}
  for threads in {1, processes}:
    tower, start = export.image_tower(threads), time.perf_counter()
    for i in range(0, len(pixels), 64):
      tower(pixels[i:i + 64])
    out_rates[f'tower alone, {threads} threads'] = len(pixels) / (time.perf_counter() - start)
  return out_rates


def processor_time(model: pathlib.Path, folder: pathlib.Path) -> tuple[float, float]:
  """Processor milliseconds a picture: reading it (file, decoding, resizing), and the tower on one thread. Busy machines
  change them less than rates."""
  export = towers.Export(model)
  tower, files = export.image_tower(), [folder / path for path, _, _ in pictures.find(folder)[0]][:512]
  marks = [time.process_time()]
  pixels = np.stack([pictures.read(file, export.size) for file in files])
  marks.append(time.process_time())
  for i in range(0, len(files), 64):
    tower(pixels[i:i + 64])
  marks.append(time.process_time())
  read, embed = (1000 * (b - a) / len(files) for a, b in zip(marks, marks[1:], strict=False))
  return read, embed


def main() -> None:
  """Prints all of it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', type=pathlib.Path, required=True)
  parser.add_argument('--pictures', type=pathlib.Path, required=True)
  parser.add_argument('--processes', type=cli.positive, default=os.cpu_count() or 1)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    print(f'{VECTORS:,} vectors of {DIM}: {search(pathlib.Path(folder)):.1f} ms a query on one core')
    print('processor time a picture: reading {:.2f} ms, tower {:.2f} ms'.format(*processor_time(args.model, args.pictures)))
    for name, rate in rates(args.model, args.pictures, args.processes).items():
      print(f'{name}: {rate:.0f} pictures a second')


if __name__ == '__main__':
  sys.exit(cli.run(main))
