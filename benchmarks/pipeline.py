"""Images per second of one core from each kind of source to 224 px batches, beside decoding alone and open_clip's pipeline.

    python -m benchmarks.pipeline --out=docs/pipeline.json [--open_clip=PYTHON] [--images=2000]

Seconds are CPU seconds of all threads of the process, so that what else runs on the machine matters little; medians over
rounds, of ratios in a round. Then speed and memory on one tar and on four times as many records. PYTHON is an interpreter
with open_clip and webdataset (launch/parity_env.sh makes it, with `pip install webdataset` after that).
"""
import argparse
import io
import itertools
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import simplejpeg
import tqdm

from lightclip_jax import cli
from lightclip_jax import config as configs
from lightclip_jax.data import convert, datasets, pipeline, sources, tokenizers

SIZE, BATCH, CONTEXT = 224, 256, 77


def photo(number: int) -> bytes:
  """A JPEG of about 512 px, with edges and grain as a photo has."""
  random = np.random.default_rng(number)
  height, width = random.permutation((512, 512 + 32 * int(random.integers(9))))
  coarse = PIL.Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((width, height), PIL.Image.BICUBIC)
  image = np.asarray(coarse).astype(np.int16) + random.integers(-14, 15, (height, width, 1))
  return simplejpeg.encode_jpeg(np.clip(image, 0, 255).astype(np.uint8), 85)


def write(folder: pathlib.Path, images: list[bytes]) -> dict[str, str]:
  """The same pairs as tar, table, folder, Parquet (10 rows a group) and ArrayRecord; kind -> `data.dataset`."""
  captions = [f'a photo of thing {i} beside another thing, seen from the left' for i in range(len(images))]
  for name in ('tar', 'files', 'parquet'):
    (folder / name).mkdir()
  with tarfile.open(folder / 'tar/00000.tar', 'w') as tar:
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
      for suffix, data in (('jpg', image), ('txt', caption.encode())):
        member = tarfile.TarInfo(f'{i:08d}.{suffix}')
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
      (folder / f'files/{i:08d}.jpg').write_bytes(image)
      (folder / f'files/{i:08d}.txt').write_text(caption)
  rows = [f'{i:08d}.jpg\t{caption}\n' for i, caption in enumerate(captions)]
  (folder / 'files/pairs.tsv').write_text('filepath\ttitle\n' + ''.join(rows))
  table = pyarrow.table({'image': [{'bytes': image, 'path': ''} for image in images], 'caption': captions})
  pyarrow.parquet.write_table(table, folder / 'parquet/x.parquet', row_group_size=10)
  (folder / 't.model').write_bytes(tokenizers.train(captions[:500], 400).to_bytes())
  names = {'webdataset': f'webdataset:{folder}/tar', 'tsv': f'tsv:{folder}/files/pairs.tsv', 'folder': f'folder:{folder}/files',
           'parquet': f'parquet:{folder}/parquet'}
  prepared = folder / 'prepared'
  convert.convert(datasets.about(names['webdataset'], configs.Data()), prepared,
                  convert.Options(duplicates='keep', tokenizer=str(folder / 't.model')), 1)
  return {**names, 'array_record': str(prepared)}


def rate(run: Callable[[], int]) -> float:
  """Images per CPU second of this process."""
  start = time.process_time()
  return run() / (time.process_time() - start)


def decode_only(images: list[bytes]) -> int:
  """simplejpeg, whole images."""
  return sum(simplejpeg.decode_jpeg(image) is not None for image in images)


class Ours:
  """Ready batches of 256 from one source, tokens and masks included."""

  def __init__(self, name: str, tokenizer: pathlib.Path):
    options = configs.replace(configs.Data(), tokenizer=str(tokenizer), workers=0, prefetch=0)   # all is made when asked for
    self._batches = pipeline.train_batches(datasets.resolve(name, options), options, image_size=SIZE, context=CONTEXT,
                                           batch_size=BATCH, seed=0)
    next(self._batches)

  def rate(self, batches: int) -> float:
    """Images per CPU second."""
    return rate(lambda: sum(len(batch['image']) for batch in itertools.islice(self._batches, batches)))


def scaled(folder: pathlib.Path, copies: int, batches: int) -> dict[str, float]:
  """Speed and memory of a process of its own that reads that many copies of the tar."""
  tars = folder / f'tars{copies}'
  tars.mkdir()
  for number in range(copies):
    os.link(folder / 'tar/00000.tar', tars / f'{number:05d}.tar')
  done = subprocess.run([sys.executable, '-m', 'benchmarks.pipeline', f'--measure={tars}', f'--batches={batches}'], check=True,
                        text=True, stdout=subprocess.PIPE)
  return json.loads(done.stdout.splitlines()[-1])


def measure(tars: pathlib.Path, batches: int) -> dict[str, float]:
  """What `scaled` asks for; the index is made in another process before, as it is once for all."""
  name = f'webdataset:{tars}'
  datasets.resolve(name, configs.Data(tokenizer=str(tars.parent / 't.model')))
  found = Ours(name, tars.parent / 't.model').rate(batches)
  peak = re.search(r'VmHWM:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())   # getrusage counts the parent's, too
  return {'images_per_cpu_second': found, 'megabytes': int(peak[1]) / 1024}


def index_speed(folder: pathlib.Path) -> float:
  """MB of tar that are indexed in a second."""
  file = folder / 'tar/00000.tar'
  start = time.perf_counter()
  with file.open('rb', buffering=0) as opened:
    assert list(sources.webdataset.walk(opened, file.stat().st_size))
  return file.stat().st_size / 1e6 / (time.perf_counter() - start)


OPEN_CLIP = '''
import sys, time, types
sys.path.insert(0, sys.argv[3])
import torch_side
import webdataset as wds
from open_clip import SimpleTokenizer, image_transform
transform, tokenizer = image_transform(224, is_train=True), SimpleTokenizer()
dataset = wds.DataPipeline(   # open_clip_train.data.get_wds_dataset's, on one shard again and again
  wds.SimpleShardList([sys.argv[1]] * 1000), wds.tarfile_to_samples(), wds.shuffle(1000, initial=500), wds.decode('pilrgb'),
  wds.rename(image='jpg;png;jpeg;webp', text='txt'),
  wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]), wds.to_tuple('image', 'text'),
  wds.batched(256, partial=False))
batches = iter(wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=0))
next(batches)
for _ in sys.stdin:
  start = time.process_time()
  count = sum(len(next(batches)[0]) for _ in range(int(sys.argv[2])))
  print(count / (time.process_time() - start), flush=True)
'''


class OpenClip:
  """open_clip's WebDataset pipeline, in its own environment, PyTorch on one thread."""

  def __init__(self, python: str, folder: pathlib.Path, batches: int):
    side = pathlib.Path(__file__).parents[1] / 'tests/models'
    command = [python, '-c', OPEN_CLIP, str(folder / 'tar/00000.tar'), str(batches), str(side)]
    self._process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     env={**os.environ, 'OMP_NUM_THREADS': '1'})

  def rate(self, _: int) -> float:
    """Images per CPU second."""
    print(file=self._process.stdin, flush=True)
    return float(self._process.stdout.readline().split()[-1])

  def close(self) -> None:
    """Ends it."""
    self._process.communicate()


def main() -> None:
  """Measures, prints a table and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path)
  parser.add_argument('--open_clip', metavar='PYTHON')
  parser.add_argument('--images', type=cli.positive, default=2000)
  parser.add_argument('--batches', type=cli.positive, default=2, help='of each, in a round')
  parser.add_argument('--rounds', type=cli.positive, default=5)
  parser.add_argument('--measure', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.measure, args.batches)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    os.environ['LIGHTCLIP_DATA'] = f'{temporary}/cache'
    result = campaign(pathlib.Path(temporary), args)
  text = json.dumps(result, indent=1)
  print(text)
  if args.out:
    args.out.write_text(text + '\n')
    plot(result, args.out.with_suffix('.svg'))


def campaign(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
  """All rounds: in each everything is measured once, so that what else the machine does falls on all alike."""
  images = [photo(i) for i in range(args.images)]
  runs = {kind: Ours(name, folder / 't.model') for kind, name in write(folder, images).items()}
  if args.open_clip:
    runs['open_clip'] = OpenClip(args.open_clip, folder, args.batches)
  rates = {'decode only': [], **{kind: [] for kind in runs}}
  for _ in tqdm.trange(args.rounds, desc='rounds'):
    rates['decode only'].append(rate(lambda: decode_only(images[:args.batches * BATCH])))
    for kind, run in runs.items():
      rates[kind].append(run.rate(args.batches))
  if args.open_clip:
    runs['open_clip'].close()
  median = lambda base: {kind: float(np.median(np.divide(values, rates[base]))) for kind, values in rates.items()}  # noqa: E731
  return {'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'images': len(images), 'rounds': args.rounds,
          'mean_bytes': float(np.mean([len(image) for image in images])),
          'images_per_cpu_second': {kind: float(np.median(values)) for kind, values in rates.items()},
          'of_decode_only': median('decode only'), **({'of_open_clip': median('open_clip')} if args.open_clip else {}),
          'index_megabytes_per_second': index_speed(folder),
          'copies_of_the_tar': {copies: scaled(folder, copies, 3 * args.batches) for copies in (1, 4)}}


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
  """Bars: images per CPU second of each."""
  rates = result['images_per_cpu_second']
  figure, axes = plt.subplots(figsize=(7, 2.8), layout='constrained')
  bars = axes.barh(list(rates)[::-1], list(rates.values())[::-1],
                   color=['0.6' if kind in ('decode only', 'open_clip') else 'C0' for kind in rates][::-1])
  axes.bar_label(bars, fmt='%.0f', padding=3)
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_xlabel('images per second of one core, to batches of 224 px')
  figure.savefig(path)


if __name__ == '__main__':
  sys.exit(cli.run(main))
