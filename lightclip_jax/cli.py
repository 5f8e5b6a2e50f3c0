"""What all entry points share: a mistake of the user's is one line and exit code 2, Ctrl-C one line and 130, a disk that
takes no more, or does not answer, one line and 1."""
import argparse
import errno
import sys
from collections.abc import Callable

from lightclip_jax import storage
from lightclip_jax.errors import UserError

_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_WRONG_PATH = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def run(main: Callable[[], int | None], debug: bool = False) -> int:
  """Calls `main` and gives the exit code; with `debug`, errors keep their traceback."""
  try:
    with storage.bucket_errors():
      return main() or 0
  except UserError as error:
    if debug:
      raise
    print(f'error: {error}', file=sys.stderr)
    return 2
  except OSError as error:
    named = _named(error)
    if not debug and named.errno in _WRONG_PATH and named.filename:
      print(f'error: {named.strerror}: {named.filename!r}; give another path', file=sys.stderr)
      return 2
    if not debug and named.errno == errno.ENOENT and named.filename:   # 1: launch scripts try again, since it may come back
      print(f'error: {named.strerror}: {named.filename!r}; put it back or give another path', file=sys.stderr)
      return 1
    if debug or not (error.errno in _LASTING or storage.passes(error)):
      raise
    opened = ('the standard output, or a connection' if isinstance(error, BrokenPipeError) else
              'that of the workdir or of the data' if type(error) is ConnectionError else 'a file that is open')
    where = named.filename or opened
    first = 'make room, and' if named.errno in _LASTING else 'when it answers again,'
    print(f'error: {named.strerror or named}: {where}; {first} start the same command again', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    if debug:
      raise
    print('stopped', file=sys.stderr)
    return 130


def _named(error: OSError) -> OSError:
  """The error that names a file: this one, or the one that was being handled when closing the logs failed as well."""
  found: BaseException | None = error
  while found and not getattr(found, 'filename', None):
    found = found.__context__
  return found if isinstance(found, OSError) else error


def positive(text: str) -> int:
  """A flag's whole number from 1, for argparse."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 1')
  return int(text)


def config_overrides(arguments: list[str]) -> dict[str, str]:
  """`--config.a.b=value` arguments as {"a.b": "value"}.

  Raises:
    UserError: for any other argument.
  """
  overrides = {}
  for argument in arguments:
    key, equals, value = argument.partition('=')
    if not key.startswith('--config.') or not equals:
      raise UserError(f'unexpected argument {argument!r}; options of the config are written --config.a.b=value')
    overrides[key.removeprefix('--config.')] = value
  return overrides
