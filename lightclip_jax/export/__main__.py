"""Exports a checkpoint: python -m lightclip_jax.export --checkpoint=DIR --format=onnx|stablehlo|open_clip --out=DIR"""
import argparse
import sys

from lightclip_jax import cli, storage


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's flags."""
  parser = argparse.ArgumentParser(
    prog='python -m lightclip_jax.export', description='Writes the two towers of a checkpoint for another runtime.',
    epilog='example: python -m lightclip_jax.export --checkpoint=runs/quickstart --format=onnx --int8 --out=deployed')
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir of lightclip_jax.main, or its folder of checkpoints')
  parser.add_argument('--step', default='last', metavar='last|best|N',
                      help="which checkpoint; best is by the metric that the config's checkpoint.best names")
  parser.add_argument('--format', required=True, choices=('onnx', 'stablehlo', 'open_clip'))
  parser.add_argument('--out', required=True, help='the folder to write, on a disk')
  parser.add_argument('--int8', action='store_true', help='onnx: writes OUT/int8 too, quantised dynamically')
  parser.add_argument('--tokens', action='store_true',
                      help="onnx: writes the token heads too, which only training and the search page's matching use")
  parser.add_argument('--data', help="a prepared folder to verify on; without it: the config's data set, if it is here")
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
  """Writes the folder and prints how it was verified."""
  from lightclip_jax.export import export
  from lightclip_jax.inference import checkpoint

  out, data = storage.on_disk(args.out), storage.path(args.data) if args.data else None
  loaded = checkpoint.load(storage.path(args.checkpoint), checkpoint.which(args.step))
  for line in export.export(loaded, args.format, out, data=data, int8=args.int8, tokens=args.tokens):
    print(line, flush=True)


if __name__ == '__main__':
  flags = parse()
  sys.exit(cli.run(lambda: main(flags), flags.debug))
