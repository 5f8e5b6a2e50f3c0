"""Weights that others published, read as numpy arrays: safetensors, and PyTorch's `.pth` in both of its formats.

A `.pth` is a pickle, which can run any code that it names. The reader here knows tensors and plain containers; a file that
names anything else is refused before it is called. PyTorch is not needed.
"""
import collections
import io
import json
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from lightclip_jax.errors import UserError

LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
_STORAGES = {'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'BFloat16': ml_dtypes.bfloat16, 'Long': np.int64,
             'Int': np.int32, 'Short': np.int16, 'Char': np.int8, 'Byte': np.uint8, 'Bool': np.bool_}
_SAFETENSORS = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
                'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
_NESTED = ('state_dict', 'model_state_dict', 'model')   # where training scripts put the weights inside their checkpoint


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Arrays by name. Wrappers that scripts add are removed: `state_dict` around the weights, `module.` before each name.

  Raises:
    UserError: for a file that is missing, damaged, of another kind, or one that names more than tensors.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f'there is no weight file {str(path)!r}')
  try:
    arrays = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pth(path)
  except UserError as error:
    raise UserError(f'{str(path)!r}: {error}') from error
  except Exception as error:   # a damaged pickle can raise nearly anything
    raise UserError(f'{str(path)!r} is no whole safetensors or .pth file ({type(error).__name__}: {error})') from error
  if not arrays:
    raise UserError(f'{str(path)!r} holds no tensors')
  return {name.removeprefix('module.'): array for name, array in arrays.items()}


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  data = path.read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:start])
  header.pop('__metadata__', None)
  arrays = {}
  for name, entry in header.items():
    first, last = entry['data_offsets']
    arrays[name] = np.frombuffer(data[start + first:start + last], _SAFETENSORS[entry['dtype']]).reshape(entry['shape'])
  return arrays


class _Storage(NamedTuple):
  """A named run of bytes in the file."""
  dtype: Any
  key: str


class _Tensor(NamedTuple):
  """A view of a storage; storages of the legacy format come after the pickle, so views wait for them."""
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
  return data


_ALLOWED: dict[str, Callable[..., Any]] = {
  'collections.OrderedDict': collections.OrderedDict, 'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_tensor': _tensor, 'torch._utils._rebuild_parameter': _parameter}


class _Unpickler(pickle.Unpickler):
  """Finds nothing but what makes tensors.

  Attributes:
    dtypes: of the storages seen, by key.
  """

  def __init__(self, file: BinaryIO) -> None:
    super().__init__(file)
    self.dtypes: dict[str, Any] = {}

  def find_class(self, module: str, name: str) -> Any:
    kind = name.removesuffix('Storage')
    if module == 'torch' and name.endswith('Storage') and kind in _STORAGES:
      return np.dtype(_STORAGES[kind])
    if f'{module}.{name}' not in _ALLOWED:
      raise UserError(f'it names {module}.{name}, which is no tensor or plain container; it is not loaded')
    return _ALLOWED[f'{module}.{name}']

  def persistent_load(self, saved: Any) -> _Storage:
    kind, dtype, key = saved[:3]
    if kind != 'storage':
      raise UserError(f'it refers to {kind!r}; only tensors are known')
    self.dtypes[str(key)] = dtype
    return _Storage(dtype, str(key))


def _read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      return _read_zip(archive)
  with path.open('rb') as file:
    return _read_legacy(file)


def _read_zip(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
  """<name>/data.pkl, and a file <name>/data/<key> for each storage."""
  root = next(name for name in archive.namelist() if name.endswith('data.pkl')).removesuffix('data.pkl')
  if f'{root}byteorder' in archive.namelist() and archive.read(f'{root}byteorder') != b'little':
    raise UserError('it is big-endian; only little-endian files are known')
  content = _Unpickler(io.BytesIO(archive.read(f'{root}data.pkl'))).load()
  return _arrays(content, lambda storage: np.frombuffer(archive.read(f'{root}data/{storage.key}'), storage.dtype))


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
  """Pickles of a magic number, a version, the machine, the content and the storages' keys; then each storage's bytes."""
  magic, _, _ = (_Unpickler(file).load() for _ in range(3))
  if magic != LEGACY_MAGIC:
    raise UserError('it is a pickle, but none that torch.save writes')
  reader = _Unpickler(file)
  content, dtypes, storages = reader.load(), reader.dtypes, {}   # also of an optimizer's storages, which lie among the others
  for key in _Unpickler(file).load():
    count = int.from_bytes(file.read(8), 'little')
    if key not in dtypes:
      raise UserError(f'its storage {key} belongs to no tensor')
    storages[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key])
  return _arrays(content, lambda storage: storages[storage.key])


def _arrays(content: Any, find: Callable[[_Storage], np.ndarray]) -> dict[str, np.ndarray]:
  return {name: _view(tensor, find(tensor.storage)) for name, tensor in _state_dict(content).items()}


def _state_dict(content: Any) -> dict[str, _Tensor]:
  """The tensors by name, wherever the script put them; what lies beside them, such as its best accuracy, is left out."""
  if not isinstance(content, Mapping):
    raise UserError(f'it holds a {type(content).__name__}, no dict of tensors')
  inner = (content[name] for name in _NESTED if isinstance(content.get(name), Mapping))
  tensors = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
  return next(filter(None, map(_state_dict, inner)), tensors)


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
  last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
  if min(tensor.offset, *tensor.strides, 0) < 0 or (0 not in tensor.shape and last >= len(storage)):
    raise UserError('a tensor reaches beyond its storage')
  strides = [step * storage.itemsize for step in tensor.strides]
  return np.lib.stride_tricks.as_strided(storage[tensor.offset:], tensor.shape, strides).copy()
