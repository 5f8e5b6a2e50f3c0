"""The files of the search page: our own, ONNX Runtime Web's, and the export's."""
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping

from lightclip_jax.errors import UserError
from lightclip_jax.inference import exported
from lightclip_jax.search.towers import Export

PAGE = pathlib.Path(__file__).parent / 'page'
RUNTIME = 'onnxruntime-web', '1.30.0'   # an npm package; the client checks it against the registry's hash
# Without a GPU, and with one: modules and the WebAssembly that each loads.
_RUNTIME_FILES = ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm', 'ort.webgpu.min.mjs',
                  'ort-wasm-simd-threaded.asyncify.mjs', 'ort-wasm-simd-threaded.asyncify.wasm')


def files(export: Export) -> dict[str, pathlib.Path]:
  """All files of the page: path in a URL, without the first slash -> where it lies.

  Raises:
    UserError: if the page cannot read the tokenizer, or the runtime is not in the cache and cannot be fetched.
  """
  _check_tokenizer(export.files['tokenizer'])   # first: a mistake in it must not wait for a download
  folder = runtime()
  model = {exported.MODEL_FILE: export.folder / exported.MODEL_FILE, **{file.name: file for file in export.files.values()}}
  return {**{file.name: file.resolve() for file in sorted(PAGE.iterdir()) if file.is_file()},
          **{f'runtime/{name}': folder / name for name in _RUNTIME_FILES},
          **{f'model/{name}': file.resolve() for name, file in model.items()}}


def _check_tokenizer(file: pathlib.Path) -> None:
  try:
    kind = json.loads(file.read_bytes())['model']['type'] if file.suffix == '.json' else 'BPE'
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"the export's {file.name!r} is damaged ({type(error).__name__}: {error}); export again") from error
  if kind != 'BPE':
    raise UserError(f"the export's {file.name!r} is of type {kind}, which the search page does not read; it reads "
                    "SentencePiece's models, byte pairs (BPE) and CLIP's")


def runtime() -> pathlib.Path:
  """The cached folder of ONNX Runtime Web's files, fetched by npm the first time.

  Raises:
    UserError: if it cannot be fetched.
  """
  from lightclip_jax.data.datasets import cache, npm  # here: it imports much

  folder = cache().absolute() / '-'.join(RUNTIME)
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
      print('fetching', *RUNTIME, '…', flush=True)
      fetched = npm.fetch(dict([RUNTIME]), pathlib.Path(temporary)) / RUNTIME[0] / 'dist'
      partial = pathlib.Path(temporary) / 'partial'
      partial.mkdir()
      for name in _RUNTIME_FILES:
        shutil.copyfile(fetched / name, partial / name)
      try:
        os.rename(partial, folder)
      except OSError:
        if not folder.is_dir():   # else another process was faster
          raise
  return folder


def bundle(site: Mapping[str, pathlib.Path], out: pathlib.Path) -> int:
  """Copies the site into the folder `out`; returns its bytes.

  Raises:
    UserError: if `out` is not a new or an empty folder.
  """
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'{str(out)!r} holds something; give a new or an empty folder')
  for name, file in site.items():
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, out / name)
  return sum((out / name).stat().st_size for name in site)
