"""Images per second of one core from each kind of source to 224 px batches, beside decoding alone and open_clip's pipeline.

    python -m benchmarks.pipeline --out=/tmp/pipeline.json [--open_clip=PYTHON] [--images=2000]

Seconds are CPU seconds of all threads of the process, so that what else runs on the machine matters little. PYTHON is an
interpreter with open_clip and webdataset (launch/parity_env.sh makes it, with `pip install webdataset` after that).
"""
import argparse
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import simplejpeg

from lightclip_jax import config as configs
from lightclip_jax.data import convert, datasets, pipeline, sources, tokenizers

SIZE, BATCH, CONTEXT = 224, 256, 77


def photo(number: int) -> bytes:
  """A JPEG of about 512 px and 60 kB, with edges and grain as a photo has."""
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


def decode_only(images: list[bytes]) -> float:
  """simplejpeg, whole images."""
  return rate(lambda: sum(simplejpeg.decode_jpeg(image) is not None for image in images))


def of_source(name: str, tokenizer: pathlib.Path, batches: int) -> float:
  """Ready batches of 256, tokens and masks included."""
  options = configs.replace(configs.Data(), tokenizer=str(tokenizer), workers=0)
  made = pipeline.train_batches(datasets.resolve(name, options), options, image_size=SIZE, context=CONTEXT, batch_size=BATCH,
                                seed=0)
  next(made)
  run = rate(lambda: sum(len(batch['image']) for batch in itertools.islice(made, batches)))
  made.close()
  return run


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
start = time.process_time()
count = sum(len(next(batches)[0]) for _ in range(int(sys.argv[2])))
print(count / (time.process_time() - start))
'''


def of_open_clip(python: str, folder: pathlib.Path, batches: int) -> float:
  """open_clip's WebDataset pipeline, in its own environment, PyTorch on one thread."""
  side = pathlib.Path(__file__).parents[1] / 'tests/models'
  command = [python, '-c', OPEN_CLIP, str(folder / 'tar/00000.tar'), str(batches), str(side)]
  done = subprocess.run(command, check=True, text=True,
                        stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
  return float(done.stdout.split()[-1])


def main() -> None:
  """Measures, prints a table and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--open_clip', metavar='PYTHON')
  parser.add_argument('--images', type=int, default=2000)
  parser.add_argument('--batches', type=int, default=6)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    os.environ['LIGHTCLIP_DATA'] = f'{temporary}/cache'
    folder = pathlib.Path(temporary)
    images = [photo(i) for i in range(args.images)]
    names = write(folder, images)
    rates = {'decode only': decode_only(images[:args.batches * BATCH])}
    rates |= {kind: of_source(name, folder / 't.model', args.batches) for kind, name in names.items()}
    if args.open_clip:
      rates['open_clip'] = of_open_clip(args.open_clip, folder, args.batches)
    result = {'images': len(images), 'mean_bytes': float(np.mean([len(image) for image in images])),
              'images_per_cpu_second': rates, 'of_decode_only': {k: v / rates['decode only'] for k, v in rates.items()},
              'index_megabytes_per_second': index_speed(folder)}
  args.out.write_text(json.dumps(result, indent=1) + '\n')
  json.dump(result, sys.stdout, indent=1)


if __name__ == '__main__':
  main()
