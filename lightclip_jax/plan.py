"""What a training step would cost: python -m lightclip_jax.plan --config=configs/mbv2.py:yfcc15m --topology=v5e:16x16"""
import argparse
import json
import pathlib
import sys

from lightclip_jax import cli
from lightclip_jax import config as config_lib
from lightclip_jax.planning.chips import Topology


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, config_lib.Config]:
  """The command line's flags and the config that they make.

  Raises:
    UserError: for a config file, variant, key, value or topology that does not exist or fit.
  """
  parser = argparse.ArgumentParser(
      prog='python -m lightclip_jax.plan',
      description='Compiles the training step for hardware that is not there, and says what it needs. TPU topologies '
                  'need the package libtpu, GPUs JAX with CUDA (else they are planned by formula), and neither a device.',
      epilog='example: python -m lightclip_jax.plan --config=configs/mbv2.py:yfcc15m --topology=v5e:16x16 '
             '--config.train.batch_size=32768 --json=plan.json')
  parser.add_argument('--config', required=True, metavar='FILE[:VARIANT]',
                      help='a config; any option of it as --config.a.b=value')
  parser.add_argument('--topology', required=True, metavar='KIND:SHAPE',
                      help='v4, v5e, v5p or v6e with a shape such as 16x16; gpu:N (H100); cpu:N')
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='where to write the plan too')
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  flags, rest = parser.parse_known_args(argv)
  flags.topology = Topology.parse(flags.topology)
  return flags, config_lib.load(flags.config, cli.config_overrides(rest))


def main(argv: list[str] | None = None) -> int:
  """Prints the plan; returns 0 if it fits or the memory is not known, 1 if it does not."""
  flags, config = parse(argv)
  flags.topology.prepare()
  from lightclip_jax.planning import measure, table  # they import JAX, which reads the environment just made

  plan = measure.make_plan(config, flags.topology)
  print(table.format_plan(plan), flush=True)
  if flags.json:
    flags.json.write_text(json.dumps(plan, indent=2) + '\n')
  return int(plan['verdict']['fits'] is False)


if __name__ == '__main__':
  sys.exit(cli.run(main, debug='--debug' in sys.argv))
