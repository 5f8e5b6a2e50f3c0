"""Evaluates a checkpoint: python -m lightclip_jax.evaluate --checkpoint=DIR [--task=NAME ...] --out=FILE.json

Several that are evaluated already, side by side: python -m lightclip_jax.evaluate --compare DIR DIR ... --out=FILE.html
"""
import argparse
import os
import sys

from lightclip_jax import cli, storage

EXIT_TASK_FAILED = 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's flags."""
  parser = argparse.ArgumentParser(
    prog='python -m lightclip_jax.evaluate', description='Evaluates a checkpoint. docs/EVALUATION.md lists the tasks.',
    epilog='example: python -m lightclip_jax.evaluate --checkpoint=runs/quickstart --task=all --out=results.json')
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--checkpoint', metavar='DIR', help='a workdir of lightclip_jax.main, or its folder of checkpoints')
  what.add_argument('--compare', nargs='+', metavar='DIR',
                    help='workdirs, or files of results, to be shown side by side on one page; nothing is computed')
  parser.add_argument('--step', default='last', metavar='last|best|N',
                      help="which checkpoint; best is by the metric that the config's checkpoint.best names")
  parser.add_argument('--task', action='append', default=[], metavar='NAME',
                      help='a task to run; may be repeated; "all" is all that the emoji sets allow. '
                           'Without it: the splits that the config names')
  parser.add_argument('--data', help="a prepared folder, a built-in data set, or KIND:PATH (columns of the usual names), "
                                     "all records of which are then the split heldout; without it: the config's")
  parser.add_argument('--prompts', metavar='NAME|FILE.json', help="templates instead of the tasks' own")
  parser.add_argument('--batch_size', type=int, help="examples at a time; without it: the config's")
  parser.add_argument('--out', required=True, help='the JSON file to write; with --compare the HTML file')
  parser.add_argument('--csv', metavar='FILE', help='a CSV file to append the results to')
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
  """Prints the table and writes the files; the exit code says whether a task failed."""
  from lightclip_jax.data import datasets

  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(datasets.cache() / 'compiled'))
  from lightclip_jax import distributed  # after the line above: JAX reads the variable when it is imported
  from lightclip_jax.evaluation import alone, compare, prompts, tasks

  if args.compare:
    runs = [compare.read(path) for path in args.compare]
    print(f'{compare.format_table(runs)}\npage: {compare.write_page(args.out, runs)}')
    return 0
  chosen = tasks.choose(args.task)         # a wrong name must not wait for the checkpoint to load
  templates = prompts.choose(args.prompts)
  distributed.initialize()
  with distributed.keeping_its_code():
    failed = alone.evaluate(storage.path(args.checkpoint), chosen, args.out, step=args.step, csv=args.csv, data=args.data,
                            templates=templates, batch_size=args.batch_size, debug=args.debug)
  return EXIT_TASK_FAILED if failed else 0


if __name__ == '__main__':
  flags = parse()
  sys.exit(cli.run(lambda: main(flags), flags.debug))
