"""Searches one's own pictures by words or by a picture: python -m lightclip_jax.search index|query|serve|bundle"""
import argparse
import json
import sys
from collections.abc import Callable

from lightclip_jax import cli, storage
from lightclip_jax.errors import UserError

_EXAMPLES = """examples:
  python -m lightclip_jax.search index ~/Pictures --model=deployed --out=pictures.index
  python -m lightclip_jax.search query pictures.index "a red apple" --top=5
  python -m lightclip_jax.search serve --model=deployed
  python -m lightclip_jax.search bundle --model=deployed --out=site"""


_PATHS = 'folder', 'model', 'out', 'index', 'image'   # of all commands


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's flags."""
  parser = argparse.ArgumentParser(prog='python -m lightclip_jax.search', description=__doc__, epilog=_EXAMPLES,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  for name, (add_flags, function, text) in COMMANDS.items():
    flags = commands.add_parser(name, help=text, description=text, epilog=_EXAMPLES, formatter_class=parser.formatter_class)
    add_flags(flags)
    flags.add_argument('--debug', action='store_true', help='show the traceback of an error')
    flags.set_defaults(function=function)
  return parser.parse_args(argv)


def _index_flags(flags: argparse.ArgumentParser) -> None:
  flags.add_argument('folder', help='the pictures, recursively')
  _model_flag(flags)
  flags.add_argument('--out', required=True, metavar='INDEX',
                     help='the index: a new folder, or one to bring up to date')
  flags.add_argument('--processes', type=cli.positive, help='default: one a core')


def _query_flags(flags: argparse.ArgumentParser) -> None:
  flags.add_argument('index', help='what `index` made')
  flags.add_argument('text', nargs='?', help='what the pictures should show')
  flags.add_argument('--image', metavar='FILE',
                     help='a picture to which others should be similar, instead of a text')
  flags.add_argument('--top', type=cli.positive, default=10, help='how many answers (default 10)')
  flags.add_argument('--model', metavar='EXPORT',
                     help='the export, if it is no longer where the index was made')
  flags.add_argument('--json', action='store_true', help='answer [{"path", "cosine"}, …]')


def _serve_flags(flags: argparse.ArgumentParser) -> None:
  _model_flag(flags)
  flags.add_argument('--host', default='127.0.0.1', help='the address to listen on (default: this machine alone)')
  flags.add_argument('--port', type=int, default=8008, help='0: any that is free')


def _bundle_flags(flags: argparse.ArgumentParser) -> None:
  _model_flag(flags)
  flags.add_argument('--out', required=True, metavar='DIR', help='a new or an empty folder')


def _model_flag(flags: argparse.ArgumentParser) -> None:
  flags.add_argument('--model', required=True, metavar='EXPORT',
                     help='a folder that `lightclip_jax.export --format=onnx` wrote')


def _index(args: argparse.Namespace) -> None:
  from lightclip_jax.search import index, pictures, towers

  made, count = index.update(args.folder, towers.Export(args.model), args.out, args.processes)
  for reason in made.bad.values():
    print(f'left out: {reason}', file=sys.stderr)
  others = pictures.count_unsupported(args.folder)
  print(f'{args.out}: {len(made.files):,} pictures, {count:,} of them embedded now; {len(made.bad):,} could not be read'
        + (f'; left out: {others:,} .heic or .heif, which must be converted first (to JPEG, for example)' if others else ''))


def _query(args: argparse.Namespace) -> None:
  if (args.text is None) == (args.image is None):
    raise UserError('give one query: a text, or --image=FILE')
  from lightclip_jax.search import index, pictures, towers  # after the mistakes that need no model

  loaded = index.load(args.index)
  export = towers.Export(args.model or storage.on_disk(loaded.model))
  if export.fingerprint() != loaded.fingerprint:
    raise UserError(f'{str(export.folder)!r} is not the model that made {str(args.index)!r}; index again, or name that one '
                    'with --model')
  query = (export.encode_text([args.text]) if args.image is None else
           export.image_tower()(pictures.read(args.image, export.size)[None]))
  answers = loaded.nearest(query[0], args.top)
  if args.json:
    print(json.dumps(answers, indent=2))
  else:
    sys.stdout.reconfigure(errors='surrogateescape')   # names of files need not be UTF-8
    print(''.join(f'{answer["cosine"]:.4f}  {answer["path"]}\n' for answer in answers), end='')


def _serve(args: argparse.Namespace) -> None:
  from lightclip_jax.search import server, site, towers

  with server.open_server(site.files(towers.Export(args.model)), args.host, args.port) as running:
    print(f'search your pictures at {running.url} (Ctrl-C ends it)', flush=True)
    running.serve_forever()


def _bundle(args: argparse.Namespace) -> None:
  from lightclip_jax.search import site, towers

  size = site.bundle(site.files(towers.Export(args.model)), args.out)
  print(f'{args.out}: {size / 1e6:.1f} MB; any web server can serve it (https, or on this machine)')


# name -> (adds its flags, does it, one line of help)
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str]] = {
  'index': (_index_flags, _index, 'Embeds the pictures of a folder; run again, it embeds the new and changed ones.'),
  'query': (_query_flags, _query, 'The pictures of an index nearest to a text or a picture, with their cosines.'),
  'serve': (_serve_flags, _serve, 'A page on this machine that searches pictures in the browser; nothing is uploaded.'),
  'bundle': (_bundle_flags, _bundle, 'The same page as static files.'),
}


def main(argv: list[str] | None = None) -> None:
  """Runs one command line; raises what goes wrong."""
  args = parse(argv)
  for name in _PATHS:
    if getattr(args, name, None) is not None:
      setattr(args, name, storage.on_disk(getattr(args, name)))
  args.function(args)


if __name__ == '__main__':
  sys.exit(cli.run(main, '--debug' in sys.argv))
