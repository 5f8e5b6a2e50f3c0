"""Benchmarks are commands too: a mistake is one line, exit code 2, and no measurement."""
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize('name, flag, words', [
  ('roofline', '--config=nix.py', "error: config file 'nix.py' does not exist"),
  ('roofline', '--rounds=0', "error: argument --rounds: '0' is not a whole number from 1"),   # NaN, which is no JSON
  ('search', '--processes=-1', "error: argument --processes: '-1' is not a whole number from 1"),
])
def test_mistakes_are_one_line(name, flag, words):
  done = subprocess.run([sys.executable, '-m', f'benchmarks.{name}', flag], cwd=pathlib.Path(__file__).parents[1],
                        capture_output=True, text=True)
  assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and not done.stdout, done.stderr
