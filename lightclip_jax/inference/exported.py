"""Exported folders read back: two towers, a tokenizer and `model.json`. None of our model code runs.

Letters: b examples that a tower gets at a time, S image size, W text positions, D embedding.
"""
import importlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightclip_jax.data import tokenizers
from lightclip_jax.errors import UserError

MODEL_FILE = 'model.json'
FIELDS = ('preprocessing', 'context', 'embed_dim', 'logit_scale')


def load(folder: pathlib.Path) -> dict[str, Any]:
  """The fields of `inference.model.Model`.

  Raises:
    UserError: if `model.json` cannot be read or a file that it names is missing.
  """
  about, files = describe(folder)
  open_tower = READERS[about['format']]
  return {**{name: about[name] for name in FIELDS}, 'tokenizer': tokenizers.load(files['tokenizer']),
          'image_tower': open_tower(files['image']), 'text_tower': open_tower(files['text'])}


def format_of(folder: pathlib.Path) -> str:
  """The format that `model.json` names; 'another program' where it names none."""
  try:
    return json.loads((folder / MODEL_FILE).read_text(encoding='utf-8'))['format']
  except (ValueError, KeyError, TypeError):
    return 'another program'


def describe(folder: pathlib.Path, kinds: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
  """What `model.json` says, `FIELDS` at least, and the files 'image', 'text' and 'tokenizer' that it names.

  Raises:
    UserError: if it cannot be read, is of none of these formats (all that `READERS` knows, if not given), or a file that it
      names is missing.
  """
  kinds = kinds or tuple(READERS)
  if not (folder / MODEL_FILE).is_file():
    raise UserError(f'{str(folder)!r} is no exported folder ({MODEL_FILE} is missing); make one of a run with: '
                    f'python -m lightclip_jax.export --format={kinds[0]}')
  try:
    about = json.loads((folder / MODEL_FILE).read_text(encoding='utf-8'))
    kind = about['format']
    files = {name: folder / about[name] for name in ('image', 'text', 'tokenizer')} if kind in kinds else {}
    missing = [name for name in FIELDS if name not in about]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{str(folder / MODEL_FILE)!r} does not describe an exported model ({error!r})') from error
  if kind not in kinds:
    raise UserError(f'{str(folder)!r} is an export for {kind}; this takes one for {" or ".join(kinds)}: '
                    f'python -m lightclip_jax.export --format={kinds[0]}')
  if missing:
    raise UserError(f'{str(folder / MODEL_FILE)!r} does not describe an exported model (it lacks {", ".join(missing)})')
  for name, file in files.items():
    if not file.is_file():
      raise UserError(f'{str(folder)!r} lacks its {name} file {file.name!r}')
  return about, files


def onnx_tower(file: pathlib.Path, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
  """A tower that ONNX Runtime runs on the CPU: uint8 [b, S, S, 3] or int32 [b, W] -> float32 [b, D].

  Args:
    file: the .onnx file.
    threads: of one operator; 0: all cores.

  Raises:
    UserError: if onnxruntime is not installed, or the file is damaged.
  """
  onnxruntime = optional('onnxruntime')
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads, options.log_severity_level = threads, 3
  try:
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
  except Exception as error:   # its exceptions have no common base
    raise UserError(f'ONNX Runtime cannot read {str(file)!r}: {str(error).splitlines()[0]}') from error
  name = session.get_inputs()[0].name
  return lambda batch: session.run(None, {name: batch})[0]


def stablehlo_tower(file: pathlib.Path) -> Callable[[np.ndarray], Any]:
  """A tower that `jax.export` serialised, weights included; compiled once for each batch size.

  Raises:
    UserError: if the file is damaged.
  """
  import jax  # here alone: ONNX files are read without it
  try:
    return jax.jit(jax.export.deserialize(bytearray(file.read_bytes())).call)
  except Exception as error:   # flatbuffers and MLIR have errors of their own
    raise UserError(f'{str(file)!r} is no serialised JAX function: {str(error).splitlines()[:1]}') from error


READERS = {'onnx': onnx_tower, 'stablehlo': stablehlo_tower}


def optional(package: str) -> Any:
  """The module of a package that only export needs.

  Raises:
    UserError: if it is not installed, with the command that installs it.
  """
  try:
    return importlib.import_module(package)
  except ImportError as error:
    name = package.partition('.')[0]
    raise UserError(f'this needs the package {name}, which is not installed: pip install {name}') from error
