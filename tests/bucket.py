"""A stand-in for Cloud Storage: one store in memory, seen through fsspec and through the part of its JSON API that
tensorstore (checkpoints) and ArrayRecord (data) use."""
import http.server
import json
import re
import threading
import urllib.parse

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Gcs(MemoryFileSystem):
  """gs://bucket/name is /bucket/name of its store. There are no folders but those that hold something, as in gcsfs."""
  protocol = ('gs', 'gcs')
  store = {}

  @property
  def pseudo_dirs(self):
    return ['']

  def mkdir(self, path, create_parents=True, **_):
    """Nothing."""

  def makedirs(self, path, exist_ok=False):
    """Nothing."""

  def rmdir(self, path):
    """Nothing."""

  @classmethod
  def _strip_protocol(cls, path):
    return '/' + re.sub(r'^(gs|gcs)://', '', str(path)).strip('/')


class Server(http.server.ThreadingHTTPServer):
  """Serves `Gcs.store`; `generations` counts the writes of each object."""

  def __init__(self):
    self.generations, self.lock = {}, threading.Lock()
    fsspec.register_implementation('gcs', Gcs, clobber=True)
    super().__init__(('127.0.0.1', 0), _Handler)
    self.address = f'http://127.0.0.1:{self.server_port}'
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def handle_error(self, request, address):
    """A client may hang up."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def handle_one(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    found = re.fullmatch(r'(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?', url.path)
    bucket, name = found[1], urllib.parse.unquote(found[2] or query.get('name', ''))
    with self.server.lock:
      if not name:
        return self.list(bucket, query)
      key = f'/{bucket}/{name}'
      if self.command == 'POST':
        return self.put(key, name, query, self.rfile.read(int(self.headers['Content-Length'])))
      if key not in Gcs.store:
        return self.answer(404, b'{}')
      if self.command == 'DELETE':
        Gcs.store.pop(key)
        return self.answer(204, b'')
      return self.get(key, name, query)

  do_GET = do_POST = do_DELETE = handle_one

  def about(self, key, name):
    size = len(Gcs.store[key].getvalue())
    return {'name': name, 'size': str(size), 'generation': str(self.server.generations.get(key, 1))}

  def list(self, bucket, query):
    start = f'/{bucket}/'
    names = sorted(key.removeprefix(start) for key in Gcs.store if key.startswith(start))
    names = [name for name in names if query.get('startOffset', '') <= name < query.get('endOffset', chr(0x10ffff))]
    self.answer(200, json.dumps({'items': [self.about(start + name, name) for name in names]}).encode())

  def put(self, key, name, query, data):
    generation = self.server.generations.get(key, 1) if key in Gcs.store else 0
    if int(query.get('ifGenerationMatch', generation)) != generation:
      return self.answer(412, b'{}')
    Gcs().pipe_file(key, data)
    self.server.generations[key] = generation + 1
    self.answer(200, json.dumps(self.about(key, name)).encode())

  def get(self, key, name, query):
    if query.get('alt') != 'media':
      return self.answer(200, json.dumps(self.about(key, name)).encode())
    data = Gcs.store[key].getvalue()
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    first, last = 0, len(data) - 1
    if asked and asked[1]:
      first, last = int(asked[1]), min(last, int(asked[2] or last))
    elif asked:
      first = max(0, len(data) - int(asked[2]))
    headers = {'x-goog-generation': str(self.server.generations.get(key, 1)),
               'Content-Range': f'bytes {first}-{last}/{len(data)}'}
    self.answer(206 if asked else 200, data[first:last + 1], headers)

  def answer(self, code, body, headers=()):
    self.send_response(code)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    """Silent."""
