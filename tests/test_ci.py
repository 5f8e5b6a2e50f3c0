"""Continuous integration with stand-ins for apt-get and tests: those in a browser are required where there can be one."""
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / '.ci/run'
INSTALLS = 'for last; do :; done; case " $* " in *" install "*) ln -s "$(command -v true)" "$BIN/$last" ;; esac'


def run(folder, programs):
  """The finished process, in a checkout whose launch/test.sh says what it was told."""
  for name, text in {'.ci/run': SCRIPT.read_text(), 'launch/test.sh': 'echo "browser ${LIGHTCLIP_BROWSER:-}, flags $*"',
                     **{f'bin/{name}': f'#!/usr/bin/env bash\n{text}\n' for name, text in programs.items()}}.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  for name in ('bash', 'dirname', 'env', 'ln', 'timeout', 'true'):
    (folder / 'bin' / name).symlink_to(shutil.which(name))
  return subprocess.run([folder / '.ci/run'], env={'PATH': str(folder / 'bin'), 'BIN': str(folder / 'bin')}, cwd='/',
                        capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize('programs, required, said', [
    ({'google-chrome': 'exit 1', 'apt-get': 'touch "$BIN/called"'}, True, ''),
    ({'apt-get': f'echo noise; echo noise >&2; {INSTALLS}'}, True, ''),
    ({'apt-get': 'echo "E: no network" >&2; exit 100'}, False, 'apt-get cannot install it here'),
    ({'apt-get': 'exit 0'}, False, 'apt-get cannot install it here'),   # says that it did
    ({}, False, 'apt-get cannot install it here')])
def test_a_browser_is_required_where_there_can_be_one(tmp_path, programs, required, said):
  (tmp_path / 'bin').mkdir()
  done = run(tmp_path, programs)
  assert done.returncode == 0 and done.stdout == f'browser {"required" if required else ""}, flags -m \n'
  assert said in done.stderr and len(done.stderr.splitlines()) == bool(said)
  assert not (tmp_path / 'bin/called').exists()


def test_the_script_is_valid():
  assert os.access(SCRIPT, os.X_OK)
  subprocess.run([pathlib.Path(sys.executable).with_name('shellcheck'), SCRIPT], check=True)
