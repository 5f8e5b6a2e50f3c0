"""A web server of a fixed list of files: what is not in the list does not exist, whatever a request says."""
import functools
import http.server
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Callable, Mapping

from lightclip_jax.errors import UserError

POLICY = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; "
          "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'")   # index.html has it too
HEADERS = {
  'Content-Security-Policy': f"{POLICY}; frame-ancestors 'none'",
  'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Embedder-Policy': 'require-corp',   # for WebAssembly's threads
  'Cross-Origin-Resource-Policy': 'same-origin', 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
  'Cache-Control': 'no-cache'}
_TYPES = {'.html': 'text/html; charset=utf-8', '.css': 'text/css', '.js': 'text/javascript', '.mjs': 'text/javascript',
          '.wasm': 'application/wasm', '.json': 'application/json', '.svg': 'image/svg+xml'}


class Server(http.server.ThreadingHTTPServer):
  """Serves while `serve_forever` runs; `url` is where."""
  daemon_threads = True

  def __init__(self, address: tuple[str, int], handler: Callable):
    if ':' in address[0]:
      self.address_family = socket.AF_INET6
    super().__init__(address, handler)

  @property
  def url(self) -> str:
    """With the port that was given or found."""
    host, port = self.server_address[:2]
    return f'http://[{host}]:{port}/' if ':' in host else f'http://{host}:{port}/'

  def handle_error(self, request: object, client_address: object) -> None:
    """Says nothing about a client that went away, one line about everything else."""
    error = sys.exception()
    if not isinstance(error, OSError):
      print(f'a request failed: {error!r}', file=sys.stderr)


def open_server(site: Mapping[str, pathlib.Path], host: str = '127.0.0.1', port: int = 0) -> Server:
  """A server of `site` (path in a URL -> file); the page index.html is at /. Use it in a `with` statement.

  Raises:
    UserError: if nothing can listen at the address.
  """
  try:
    return Server((host, port), functools.partial(_Handler, dict(site)))
  except (OSError, OverflowError) as error:
    raise UserError(f'cannot listen on {host}:{port} ({getattr(error, "strerror", None) or error}); give another --port (0: '
                    'any that is free) or another --host') from error


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  server_version, sys_version = 'lightclip_jax', ''
  timeout = 30   # seconds; a client that says nothing holds a thread no longer

  def __init__(self, site: dict[str, pathlib.Path], *arguments: object):
    self._site = site
    super().__init__(*arguments)

  def do_GET(self) -> None:
    self._answer(body=True)

  def do_HEAD(self) -> None:
    self._answer(body=False)

  def end_headers(self) -> None:
    for name, value in HEADERS.items():
      self.send_header(name, value)
    super().end_headers()

  def log_message(self, *_: object) -> None:
    """The terminal stays quiet."""

  def _answer(self, body: bool) -> None:
    name = self.path.partition('?')[0].removeprefix('/') or 'index.html'
    file = self._site.get(name)   # as it came: nothing is decoded, so nothing can be spelled in another way
    try:
      stream = open(file, 'rb', opener=_no_link) if file else None
    except OSError:
      stream = None
    if stream is None:
      self.send_error(404)
      return
    with stream:
      self.send_response(200)
      self.send_header('Content-Type', _TYPES.get(file.suffix, 'application/octet-stream'))
      self.send_header('Content-Length', str(os.fstat(stream.fileno()).st_size))
      self.end_headers()
      if body:
        shutil.copyfileobj(stream, self.wfile)


def _no_link(path: str, flags: int) -> int:
  return os.open(path, flags | os.O_NOFOLLOW)
