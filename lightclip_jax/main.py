"""Trains a LightCLIP: python -m lightclip_jax.main --config=configs/mbv2.py:quickstart --workdir=DIR"""
import argparse
import os
import sys

from lightclip_jax import cli, storage
from lightclip_jax import config as config_lib


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, config_lib.Config]:
  """The command line's flags and the config that they make.

  Raises:
    UserError: for a config file, variant, key or value that does not exist or fit, or a bucket that is not reached.
  """
  parser = argparse.ArgumentParser(
      prog='python -m lightclip_jax.main', description='Trains a LightCLIP, or continues a run that was stopped.',
      epilog='example: python -m lightclip_jax.main --config=configs/mbv2.py:quickstart --workdir=runs/quickstart '
             '--config.train.steps=500')
  parser.add_argument('--config', required=True, metavar='FILE[:VARIANT]',
                      help='a config; any option of it as --config.a.b=value')
  parser.add_argument('--workdir', required=True, help='folder of the run, on a disk or gs://; with history, it is continued')
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  flags, rest = parser.parse_known_args(argv)
  flags.workdir = storage.path(flags.workdir)
  return flags, config_lib.load(flags.config, cli.config_overrides(rest))


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0 when training is complete, 75 when it was asked to stop and can be continued."""
  flags, config = parse(argv)
  from lightclip_jax.data import datasets  # JAX and all else after parsing: a wrong flag must not wait for seconds

  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(datasets.cache() / 'compiled'))
  from lightclip_jax import distributed
  distributed.initialize()
  from lightclip_jax.training import loop
  with distributed.keeping_its_code():
    return loop.train(config, flags.workdir)


if __name__ == '__main__':
  sys.exit(cli.run(main, debug='--debug' in sys.argv))
