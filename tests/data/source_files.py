"""The same pairs in every format that can be trained on, made with independent writers where there are any."""
import csv
import io
import json
import tarfile

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet

from lightclip_jax.data import manifest, writer
from lightclip_jax.data.records import Record


def jpeg(number, size=(40, 32)):
  """A smooth picture that no other number has."""
  tiny = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
  out = io.BytesIO()
  PIL.Image.fromarray(tiny).resize(size).save(out, 'JPEG')
  return out.getvalue()


def pairs(count):
  return [(f'{i:04d}', jpeg(i), f'caption, "{i}" of a thing') for i in range(count)]


def add(tar, name, data, **more):
  about = tarfile.TarInfo(name)
  about.size = len(data)
  for key, value in more.items():
    setattr(about, key, value)
  tar.addfile(about, io.BytesIO(data))


def write_tars(folder, rows, shards=3, caption='txt'):
  for shard in range(shards):
    with tarfile.open(folder / f'{shard:05d}.tar', 'w') as tar:
      for key, image, text in rows[shard::shards]:
        add(tar, f'{key}.jpg', image)
        add(tar, f'{key}.{caption}', text.encode() if caption == 'txt' else json.dumps({'caption': text}).encode())
  return f'webdataset:{folder}'


def write_images(folder, rows):
  (folder / 'images').mkdir()
  for key, image, _ in rows:
    (folder / f'images/{key}.jpg').write_bytes(image)


def write_table(folder, rows, kind):
  write_images(folder, rows)
  path = folder / f'pairs.{kind}'
  with path.open('w', newline='', encoding='utf-8') as file:
    if kind == 'jsonl':
      file.writelines(json.dumps({'filepath': f'images/{key}.jpg', 'title': text}) + '\n' for key, _, text in rows)
    else:
      writer = csv.writer(file, delimiter='\t' if kind == 'tsv' else ',')
      writer.writerows([('filepath', 'title'), *((f'images/{key}.jpg', text) for key, _, text in rows)])
  return f'{kind}:{path}'


def write_folder(folder, rows):
  write_images(folder, rows)
  for key, _, text in rows:
    (folder / f'images/{key}.txt').write_text(text)
  return f'folder:{folder}'


def write_parquet(folder, rows, files=2, group=5):
  for part in range(files):
    own = rows[part::files]
    table = pyarrow.table({'image': [{'bytes': image, 'path': key} for key, image, _ in own],
                           'caption': [text for _, _, text in own]})
    pyarrow.parquet.write_table(table, folder / f'train-{part:05d}.parquet', row_group_size=group)
  return f'parquet:{folder}'


def write_array_record(folder, rows):
  """Shards and a manifest; captions as they are, also those that `prepare` would leave out."""
  split = writer._write_split(folder, 'train', (Record(key, image, (text,)) for key, image, text in rows), [])
  manifest.Manifest(name='pairs', splits={'train': split}, tokenizer='', image_size=0, concepts=(), groups=(), licences={},
                    packages={}, sha256={shard: writer.sha256(folder / shard) for shard in split.shards}).save(folder)
  return f'array_record:{folder}'


def write_tfds(folder, rows, features=None):
  """A prepared set as TFDS lays it out below `data.image_root`; TFDS itself writes with TensorFlow only."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_generated_pb2 as proto
  if features is None:
    image = tfds.features.Image(encoding_format='jpeg')
    features = tfds.features.FeaturesDict({'image': image, 'caption': tfds.features.Text()})
    rows = [{'image': image, 'caption': text if isinstance(text, bytes) else text.encode()} for _, image, text in rows]
  folder = folder / 'tiny_pairs/1.0.0'
  folder.mkdir(parents=True)
  features.save_config(folder)
  file = array_record_module.ArrayRecordWriter(str(folder / 'tiny_pairs-train.array_record-00000-of-00001'), 'group_size:1')
  for row in rows:
    example = proto.Example()
    for name, value in row.items():
      values = example.features.feature[name]
      values.int64_list.value.append(value) if isinstance(value, int) else values.bytes_list.value.append(value)
    file.write(example.SerializeToString())
  file.close()
  (folder / 'dataset_info.json').write_text(json.dumps({
      'name': 'tiny_pairs', 'version': '1.0.0', 'fileFormat': 'array_record', 'splits': [
          {'name': 'train', 'shardLengths': [str(len(rows))], 'numBytes': '1',
           'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'}]}))
  return 'tfds:tiny_pairs'


WRITERS = {
    'webdataset': write_tars,
    'csv': lambda folder, rows: write_table(folder, rows, 'csv'),
    'tsv': lambda folder, rows: write_table(folder, rows, 'tsv'),
    'jsonl': lambda folder, rows: write_table(folder, rows, 'jsonl'),
    'folder': write_folder,
    'parquet': write_parquet,
    'array_record': write_array_record,
    'tfds': write_tfds,
}
