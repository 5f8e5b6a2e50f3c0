"""Trains a LightCLIP.

Example:
  python -m lightclip_jax.main --config=configs/mbv2.py:quickstart --workdir=/tmp/quickstart
"""
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from lightclip_jax import cli
from lightclip_jax import config as config_lib
from lightclip_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file('config', None, 'configs/NAME.py[:VARIANT]; options as --config.a.b=value')
WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run; started again with the same one, it continues')
DEBUG = flags.DEFINE_bool('debug', False, 'show the traceback of an error')


def parse(argv: list[str]) -> tuple[config_lib.Config, pathlib.Path]:
  """The config and the workdir that the command line asks for.

  Raises:
    UserError: for whatever the flags do not allow.
  """
  for argument in argv[1:]:
    name = argument.lstrip('-').partition('=')[0]
    if argument.startswith('-') and name.startswith('config.'):
      config_lib.check_key(name.removeprefix('config.'))
  try:
    rest = flags.FLAGS(argv)[1:]
  except (flags.Error, OSError) as error:
    raise UserError(str(error).splitlines()[0]) from error
  if rest:
    raise UserError(f'unexpected argument {rest[0]!r}; options are --config=…, --config.a.b=value and --workdir=…')
  if not CONFIG.value or not WORKDIR.value:
    raise UserError(f'--{"workdir" if CONFIG.value else "config"} is missing; see --help')
  return config_lib.from_dict(CONFIG.value.to_dict()), pathlib.Path(WORKDIR.value)


def main() -> int:
  """Returns the exit code: 0 when training is complete, 75 when it was asked to stop and can be continued."""
  config, workdir = parse(sys.argv)
  from lightclip_jax.training import loop  # after parsing: importing JAX takes seconds, a wrong flag should not
  return loop.train(config, workdir)


if __name__ == '__main__':
  sys.exit(cli.run(main, debug='--debug' in sys.argv))
