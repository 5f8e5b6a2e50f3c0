"""Makes the modules beside the tests importable; the small export that they share."""
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope='session')
def export_folder(tmp_path_factory):
  pytest.importorskip('onnx')
  pytest.importorskip('onnxruntime')
  import colour_export  # here: it needs onnx

  return colour_export.write(tmp_path_factory.mktemp('search') / 'export')
