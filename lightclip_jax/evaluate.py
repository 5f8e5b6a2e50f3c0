"""Evaluates a checkpoint: python -m lightclip_jax.evaluate --checkpoint=DIR [--task=NAME ...] --out=FILE.json"""
import argparse
import pathlib
import sys

from lightclip_jax import cli


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's flags."""
  parser = argparse.ArgumentParser(
    prog='python -m lightclip_jax.evaluate', description='Evaluates a checkpoint on held-out data.',
    epilog='example: python -m lightclip_jax.evaluate --checkpoint=runs/quickstart --out=results.json')
  parser.add_argument('--checkpoint', required=True, help='a workdir of lightclip_jax.main, or one of its checkpoints')
  parser.add_argument('--task', action='append', default=[], metavar='NAME',
                      help='a task to run; may be repeated. Without it: the splits that the config names')
  parser.add_argument('--data', help="a prepared folder or KIND:PATH; without it: the config's data set")
  parser.add_argument('--batch_size', type=int, help="examples at a time; without it: the config's")
  parser.add_argument('--out', required=True, help='the JSON file to write')
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
  """Prints the table and writes the JSON file."""
  from lightclip_jax.data import datasets
  from lightclip_jax.evaluation import evaluate, metrics, tasks
  from lightclip_jax.evaluation.embed import Embedder
  from lightclip_jax.inference import checkpoint
  from lightclip_jax.models.lightclip import LightCLIP

  for name in args.task:
    tasks.find(name)                     # a wrong name must not wait for the checkpoint to load
  loaded = checkpoint.load(pathlib.Path(args.checkpoint))
  config = loaded.config
  embedder = Embedder(LightCLIP(config.model), config.model, loaded.variables, loaded.tokenizer,
                      batch_size=args.batch_size or config.evaluation.batch_size)
  folder = datasets.resolve(args.data or config.data.dataset, config.data)
  run = evaluate.evaluate_tasks if args.task else evaluate.evaluate_all
  results = run(embedder, folder, args.task or config.evaluation.splits)
  print(metrics.format_table(results))
  evaluate.write_json(args.out, results, checkpoint=args.checkpoint, step=loaded.step)


if __name__ == '__main__':
  flags = parse()
  sys.exit(cli.run(lambda: main(flags), flags.debug))
