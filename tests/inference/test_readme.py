"""The README's Python examples run as they stand."""
import pathlib
import re

import numpy as np
import PIL.Image
import small_checkpoint


def test_examples(tmp_path, monkeypatch, capsys):
  readme = (pathlib.Path(__file__).parents[2] / 'README.md').read_text(encoding='utf-8')
  examples = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
  assert examples
  config = small_checkpoint.config('vit_ti')
  small_checkpoint.write(tmp_path / 'runs/quickstart', config, small_checkpoint.random_variables(config.model))
  for name in ('cat.png', 'house.png'):
    PIL.Image.new('RGB', (40, 30), 'red').save(tmp_path / name)
  monkeypatch.chdir(tmp_path)
  for example in examples:
    names = {}
    exec(compile(example, 'README.md', 'exec'), names)
  np.testing.assert_allclose(names['model'].classify(['cat.png'], ['cat', 'dog']).sum(), 1, atol=1e-5)
  assert capsys.readouterr().out.count('[[') == 2
