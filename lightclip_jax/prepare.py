"""Makes a data folder to train on, or adds to it: `python -m lightclip_jax.prepare KIND [PATH] --out=DIR`."""
import argparse
import functools
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from lightclip_jax import cli, storage
from lightclip_jax import config as configs
from lightclip_jax.data import convert, datasets, manifest, sources, tokenizers
from lightclip_jax.data.datasets import BUILT_IN
from lightclip_jax.errors import UserError

_EXAMPLE = ('example: python -m lightclip_jax.prepare emoji --out=data/emoji --size=128; '
            'python -m lightclip_jax.prepare webdataset cc3m/ --out=data/cc3m --size=256 --holdout_every=500')
_SAMPLE = 1_000_000            # captions that a tokenizer is trained on at most
_HELD_OUT = 2000               # records to evaluate on, where none were held out when a set was prepared; of few a tenth


def _built_in(name: str, args: argparse.Namespace) -> None:
  BUILT_IN[name](args.out, args.size, args.processes)
  made = manifest.load(args.out)
  if (made.name, made.image_size) != (name, args.size):
    raise UserError(f'{str(args.out)!r} holds {made.name!r} at {made.image_size} px; delete it or give another --out')
  _describe(args.out)
  _say_options(args.out)


def _describe(out: pathlib.Path) -> None:
  made = manifest.load(out)
  counts = (f'{name} {split.count:,}' for name, split in made.splits.items())
  print(f'{out}: {made.name}, {made.image_size} px, {len(made.concepts):,} concepts;', ', '.join(counts))


def _say_options(out: pathlib.Path) -> None:
  """What a config must say of a prepared folder: its words are often fewer than asked for, and its splits its own."""
  made = manifest.load(out)
  words, splits = tokenizers.load(out / made.tokenizer), tuple(name for name in made.splits if name != 'train')
  options = {'data.dataset': out, 'model.text.vocab_size': words.vocab_size}
  if words.end_id != configs.TextTower().end_id:
    options['model.text.end_id'] = words.end_id
  if not splits:   # what is trained on says little, and to rank all of it takes for ever
    options['data.holdout_every'] = max(10, made.splits['train'].count // _HELD_OUT)
  if splits != configs.Evaluation().splits:
    options['evaluation.splits'] = '(' + ''.join(f'"{name}",' for name in splits or (sources.HELDOUT,)) + ')'
  print('train with', shlex.join(f'--config.{name}={value}' for name, value in options.items()))


def _built_in_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--out', type=_path, required=True, metavar='DIR', help='a new folder')
  parser.add_argument('--size', type=_between(8, 1024), default=128, help='pixels of the square images (default 128)')
  parser.add_argument('--processes', type=_between(1, 1024), help='processes that draw (default: one a core)')


def _convert(kind: str, args: argparse.Namespace) -> None:
  options = convert.Options(args.size, args.quality, args.duplicates, args.max_pixels, args.vocab_size, args.tokenizer)
  about = datasets.about(f'{kind}:{args.path}', _data_options(args))
  convert.convert(about, args.out, options, args.processes or os.cpu_count() or 1)
  _describe(args.out)
  print((args.out / convert.SUMMARY_FILE).read_text(encoding='utf-8'), end='')
  _say_options(args.out)


def _data_options(args: argparse.Namespace) -> configs.Data:
  return configs.replace(configs.Data(), image_column=args.image_column, caption_column=args.caption_column,
                         image_root=args.image_root, holdout_every=args.holdout_every)


def _source_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('path', help='the folder or file; of tfds NAME@SPLIT; for tokenizer as config.data.dataset, KIND:PATH')
  parser.add_argument('--out', type=_path, required=True, metavar='DIR', help='a new folder (a file for tokenizer)')
  for name in ('image_column', 'caption_column', 'image_root'):
    parser.add_argument(f'--{name}', default='', help=f'as config.data.{name}')
  parser.add_argument('--vocab_size', type=_between(64, 1 << 20), default=8192, help='of the tokenizer (default 8192)')
  parser.add_argument('--holdout_every', type=_between(0, 1 << 40), default=0,
                      help='N: every N-th record (of tables: image) is held out')


def _convert_flags(parser: argparse.ArgumentParser) -> None:
  _source_flags(parser)
  parser.add_argument('--size', type=_between(0, 1 << 14), default=0, help='shorter side at most (default 0: as they are)')
  parser.add_argument('--quality', type=_between(1, 100), default=90, help='of JPEGs made anew (default 90)')
  parser.add_argument('--duplicates', choices=('keep', 'exact', 'similar'), default='exact', help='what counts as one')
  parser.add_argument('--max_pixels', type=_between(1, 1 << 40), default=configs.Data().max_pixels, help='of an image')
  parser.add_argument('--tokenizer', default='', help='a file; without it one is trained')
  parser.add_argument('--processes', type=_between(1, 1024), help='(default: one a core)')


def _tokenizer(args: argparse.Namespace) -> None:
  """Trains a SentencePiece tokenizer on evenly spaced captions of a source."""
  if args.out.suffix != '.model':
    raise UserError(f'--out is {str(args.out)!r}; a tokenizer file ends with .model')
  source = sources.open_parts(datasets.about(args.path, _data_options(args)), 'train')
  captions = convert.captions_of(source, -(-len(source) // _SAMPLE))
  made = tokenizers.train(captions, args.vocab_size)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_bytes(made.to_bytes())
  print(f'{args.out}: {made.vocab_size:,} pieces, end token {made.end_id}; set model.text.vocab_size={made.vocab_size}')


def _teacher(args: argparse.Namespace) -> None:
  from lightclip_jax.inference import teacher  # it imports JAX

  entry, temperature = teacher.prepare(args.model, args.data)
  print(f'{args.data}: embeddings of {entry.name!r}; train with --config.objective.distillation.weight=1 '
        f'--config.objective.distillation.teacher_dim={entry.dim} '
        f'--config.objective.distillation.temperature={temperature:.4f} (the teacher\'s own)')


def _teacher_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', type=_path, required=True, metavar='DIR', help='a training run or an exported folder')
  parser.add_argument('--data', required=True, metavar='DIR',
                      help='the prepared folder to add to; several as in config.data.dataset: "DIR + DIR"')


def _path(text: str) -> pathlib.Path:
  try:
    return storage.on_disk(text)   # a shell leaves the ~ of --out=~/DIR as it is
  except UserError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def _between(low: int, high: int) -> Callable[[str], int]:
  def number(text: str) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
      raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from {low} to {high}')
    return int(text)
  return number


# kind -> (adds its flags, prepares and says what is there)
KINDS = {
    **{name: (_built_in_flags, functools.partial(_built_in, name)) for name in BUILT_IN},
    **{kind: (_convert_flags, functools.partial(_convert, kind)) for kind in sources.SOURCES if kind != 'array_record'},
    'tokenizer': (_source_flags, _tokenizer),
    'teacher': (_teacher_flags, _teacher),
}


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
