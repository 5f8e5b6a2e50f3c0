"""Makes a data folder to train on, or adds to it: `python -m lightclip_jax.prepare KIND --out=DIR`."""
import argparse
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

from lightclip_jax import cli
from lightclip_jax.data import manifest
from lightclip_jax.data.datasets import BUILT_IN
from lightclip_jax.errors import UserError

_EXAMPLE = 'example: python -m lightclip_jax.prepare emoji --out=data/emoji --size=128'


def _built_in(name: str, args: argparse.Namespace) -> None:
  BUILT_IN[name](args.out, args.size, args.processes)
  made = manifest.load(args.out)
  if (made.name, made.image_size) != (name, args.size):
    raise UserError(f'{str(args.out)!r} holds {made.name!r} at {made.image_size} px; delete it or give another --out')
  counts = (f'{name} {split.count:,}' for name, split in made.splits.items())
  print(f'{args.out}: {made.name}, {made.image_size} px, {len(made.concepts):,} concepts;', ', '.join(counts))


def _built_in_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--out', type=pathlib.Path, required=True, metavar='DIR', help='a new folder')
  parser.add_argument('--size', type=_between(8, 1024), default=128, help='pixels of the square images (default 128)')
  parser.add_argument('--processes', type=_between(1, 1024), help='processes that draw (default: one a core)')


def _teacher(args: argparse.Namespace) -> None:
  from lightclip_jax.inference import teacher  # it imports JAX

  entry, temperature = teacher.prepare(args.model, args.data)
  print(f'{args.data}: embeddings of {entry.name!r}; train with --config.objective.distillation.weight=1 '
        f'--config.objective.distillation.teacher_dim={entry.dim} '
        f'--config.objective.distillation.temperature={temperature:.4f} (the teacher\'s own)')


def _teacher_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', type=pathlib.Path, required=True, metavar='DIR', help='a training run or an exported folder')
  parser.add_argument('--data', type=pathlib.Path, required=True, metavar='DIR', help='the prepared folder to add to')


def _between(low: int, high: int) -> Callable[[str], int]:
  def number(text: str) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
      raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from {low} to {high}')
    return int(text)
  return number


# kind -> (adds its flags, prepares and says what there is)
KINDS = {name: (_built_in_flags, functools.partial(_built_in, name)) for name in BUILT_IN}
KINDS['teacher'] = _teacher_flags, _teacher


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(prog='python -m lightclip_jax.prepare', description=__doc__, epilog=_EXAMPLE)
  kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND', help=', '.join(KINDS))
  for kind, (add_flags, _) in KINDS.items():
    add_flags(flags := kinds.add_parser(kind, epilog=_EXAMPLE))
    flags.add_argument('--debug', action='store_true', help='show the traceback of an error')
  return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
  """Prepares, and prints what there is."""
  KINDS[args.kind][1](args)


if __name__ == '__main__':
  sys.exit(cli.run(functools.partial(main, parsed := parse()), parsed.debug))
