"""What the run time never does with what it reads: unpickle, evaluate, unpack, or hand it to a shell."""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted([*(ROOT / 'lightclip_jax').rglob('*.py'), *(ROOT / 'configs').rglob('*.py'), *(ROOT / 'launch').rglob('*.py')])
CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'extractall', 'unpack_archive', 'yaml.load',
         'joblib.load', 'torch.load', 'marshal.loads', 'marshal.load', 'pickle.load', 'pickle.loads', 'read_pickle'}
MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'marshal', 'shelve'}
KEYWORDS = {'allow_pickle', 'shell', 'trust_remote_code'}
UNPICKLER = ROOT / 'lightclip_jax' / 'models' / 'weight_files.py'   # tensors alone: see test_weight_files.py


def findings(source: str) -> list[str]:
  """Calls and imports that turn data into code, as the text that does it."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      found += [name] if name in CALLS or name.rpartition('.')[2] in CALLS - {'compile', 'eval'} else []
      found += [k.arg for k in node.keywords
                if k.arg in KEYWORDS and not (isinstance(k.value, ast.Constant) and k.value.value is False)]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      names = [alias.name for alias in node.names] + [getattr(node, 'module', '') or '']
      found += [name for name in names if name.split('.')[0] in MODULES]
  return found


@pytest.mark.parametrize('source', ['import pickle', 'from dill import load', 'eval(x)', 'np.load(f, allow_pickle=True)',
                                    'archive.extractall(d)', 'subprocess.run(c, shell=True)', 'torch.load(f)', 'os.system(c)'])
def test_the_search_finds(source):
  assert findings(source)


def test_nothing_that_is_read_becomes_code():
  assert len(FILES) > 80
  found = {str(file.relative_to(ROOT)): findings(file.read_text()) for file in FILES if file != UNPICKLER}
  assert not {file: what for file, what in found.items() if what}


def test_the_one_unpickler_is_restricted():
  tree = ast.parse(UNPICKLER.read_text())
  calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
  assert not calls & {'pickle.load', 'pickle.loads', 'pickle.Unpickler'}
  classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
             and any('Unpickler' in ast.unparse(base) for base in node.bases)]
  methods = [{part.name for part in one.body if isinstance(part, ast.FunctionDef)} for one in classes]
  assert methods and all('find_class' in names for names in methods)
