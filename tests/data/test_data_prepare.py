"""The command `python -m lightclip_jax.prepare` and the frame that all commands share."""
import os
import subprocess
import sys

import pytest

from lightclip_jax import cli, prepare
from lightclip_jax.errors import UserError


def _run(*arguments):
  return subprocess.run([sys.executable, '-m', 'lightclip_jax.prepare', *arguments], capture_output=True, text=True,
                        check=False)


def test_prepares_says_what_and_is_done_the_second_time(tmp_path):
  out = tmp_path / 'new/shapes'
  first = _run('shapes', f'--out={out}', '--size=16')
  assert first.returncode == 0, first.stderr
  assert 'shapes, 16 px, 36 concepts; train ' in first.stdout
  before = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
  assert _run('shapes', f'--out={out}', '--size=16').stdout == first.stdout
  assert {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)} == before
  other = _run('shapes', f'--out={out}', '--size=32')
  assert other.returncode == 2 and other.stderr.startswith('error: ') and 'at 16 px' in other.stderr


@pytest.mark.parametrize(('arguments', 'said'), [
    (['emojis', '--out=x'], 'invalid choice'),
    (['shapes'], 'required: --out'),
    (['shapes', '--out=x', '--size=0'], "'0' is not a whole number from 8 to 1024"),
    (['shapes', '--out=x', '--processes=-1'], "'-1' is not a whole number"),
    (['teacher', '--data=x'], 'required: --model'),
    ([], 'required: KIND')])
def test_bad_command_lines(arguments, said, capsys):
  with pytest.raises(SystemExit) as end:
    prepare.parse(arguments)
  assert end.value.code == 2 and said in capsys.readouterr().err


def test_help_has_an_example(capsys):
  with pytest.raises(SystemExit):
    prepare.parse(['--help'])
  assert 'example: python -m lightclip_jax.prepare emoji' in capsys.readouterr().out


def test_a_teacher_that_is_not_there(tmp_path):
  done = _run('teacher', '--model=/nowhere', f'--data={tmp_path}')
  assert done.returncode == 2 and "'/nowhere' holds no checkpoint" in done.stderr and done.stderr.count('\n') == 1


def test_foreign_folder_is_one_line_or_a_traceback(tmp_path):
  (tmp_path / 'photo.jpg').touch()
  plain, debug = _run('shapes', f'--out={tmp_path}'), _run('shapes', f'--out={tmp_path}', '--debug')
  assert plain.returncode == 2 and plain.stderr.count('\n') == 1 and 'is not a prepared data set' in plain.stderr
  assert debug.returncode == 1 and 'Traceback' in debug.stderr


def test_exit_codes(capsys):
  def fail(error):
    raise error
  assert cli.run(lambda: None) == 0 and cli.run(lambda: 3) == 3
  assert cli.run(lambda: fail(UserError('bad'))) == 2
  assert capsys.readouterr().err == 'error: bad\n'
  assert cli.run(lambda: fail(KeyboardInterrupt())) == 130
  with pytest.raises(UserError):
    cli.run(lambda: fail(UserError('bad')), debug=True)
  with pytest.raises(ZeroDivisionError):
    cli.run(lambda: fail(ZeroDivisionError()))
