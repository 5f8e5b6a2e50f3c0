"""The page's server: exactly the listed files, on loopback, whatever a request looks like; and the same files as a bundle."""
import http.client
import pathlib
import random
import re
import socket
import threading
import types

import pytest

from lightclip_jax.errors import UserError
from lightclip_jax.search import server, site, towers


@pytest.fixture(scope='module')
def listed(export_folder, tmp_path_factory):
  """The site with a runtime that is not ONNX Runtime's, so that nothing is fetched."""
  fake = tmp_path_factory.mktemp('runtime')
  for name in site._RUNTIME_FILES:
    (fake / name).write_text(name)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(site, 'runtime', lambda: fake)
    return site.files(towers.Export(export_folder))


@pytest.fixture(scope='module')
def address(listed):
  with server.open_server(listed) as running:
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running.server_address
    running.shutdown()
    thread.join()


def get(address, path, method='GET'):
  connection = http.client.HTTPConnection(*address, timeout=10)
  connection.putrequest(method, path, skip_host=True)   # as it is: the client would mend it
  connection.endheaders()
  response = connection.getresponse()
  body = response.read()
  connection.close()
  return response.status, dict(response.getheaders()), body


def test_every_listed_file_is_served_whole(listed, address):
  assert {'index.html', 'app.js', 'style.css', 'model/model.json', 'model/image.onnx', 'model/tokenizer.model',
          'model/image_tokens.onnx', 'runtime/ort.wasm.min.mjs'} <= set(listed)
  for name, file in listed.items():
    status, headers, body = get(address, f'/{name}')
    assert (status, body) == (200, file.read_bytes())
    assert headers['Content-Security-Policy'] == server.HEADERS['Content-Security-Policy']
    assert headers['X-Content-Type-Options'] == 'nosniff' and headers['Content-Length'] == str(len(body))
  assert get(address, '/')[2] == get(address, '/index.html?x=1')[2] == listed['index.html'].read_bytes()
  assert get(address, '/app.js', 'HEAD')[::2] == (200, b'')
  types = [get(address, name)[1]['Content-Type'] for name in ('/', '/app.js', '/runtime/ort.wasm.min.mjs')]
  assert types == ['text/html; charset=utf-8', 'text/javascript', 'text/javascript']


def test_policy_allows_this_server_alone(listed):
  html = listed['index.html'].read_text()
  assert f'content="{server.POLICY}"' in html   # a bundle has no headers
  assert "default-src 'none'" in server.POLICY and 'unsafe-inline' not in server.POLICY and 'http' not in server.POLICY
  scripts = ''.join(file.read_text() for file in site.PAGE.iterdir())
  assert not re.search(r'https?://(?!www\.w3\.org)|\beval\(|innerHTML| style="| on[a-z]+="', scripts)


@pytest.mark.parametrize('path', [
  '/../towers.py', '/page/../server.py', '/%2e%2e/towers.py', '/..%2ftowers.py', '/%252e%252e/towers.py', '/model/../../x',
  '//etc/passwd', '/etc/passwd', '\\..\\towers.py', '/model', '/model/', '/runtime/', '/index.html/', '/index.html%00',
  '/INDEX.HTML', '/./index.html',
  'http://elsewhere/etc/passwd', '*', '/model/%69mage.onnx'])
def test_nothing_else_is_there(address, path):
  status, headers, body = get(address, path)
  assert status == 404 and b'import' not in body and 'Content-Security-Policy' in headers


def test_links_are_not_followed(tmp_path):
  (tmp_path / 'secret').write_text('secret')
  (tmp_path / 'link.js').symlink_to(tmp_path / 'secret')
  with server.open_server({'link.js': tmp_path / 'link.js', 'gone.js': tmp_path / 'gone.js'}) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    assert get(running.server_address, '/link.js')[0] == get(running.server_address, '/gone.js')[0] == 404
    running.shutdown()


def test_other_methods_are_refused(address):
  for method in ('POST', 'PUT', 'DELETE', 'OPTIONS', 'CONNECT', 'TRACE', 'PATCH'):
    assert get(address, '/app.js', method)[0] == 501


def test_a_thousand_malformed_requests(address, listed, capsys):
  rng = random.Random(0)
  whole = b'GET /app.js HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n'

  def malformed(kind):
    noise = rng.randbytes(rng.randrange(1, 200))
    return [noise, noise + b'\r\n\r\n', b'GET /' + noise + b' HTTP/1.1\r\n\r\n', whole[:rng.randrange(1, len(whole))],
            b'GET /app.js HTTP/9.9\r\n\r\n', b'GET\r\n\r\n', b'GET / HTTP/1.1\r\n' + b'A: b\r\n' * 150 + b'\r\n',
            b'GET /' + b'a' * 70000 + b' HTTP/1.1\r\n\r\n', b'GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n',
            b'GET / HTTP/1.1\r\nX: ' + b'a' * 70000 + b'\r\n\r\n'][kind % 10]
  for i in range(1000):
    with socket.create_connection(address, timeout=10) as client:
      try:
        client.sendall(malformed(i))
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(64)
      except OSError:   # the server may hang up before it has all of it
        answer = b''
    assert answer == b'' or b' 200 ' not in answer[:20] or i % 10 in (2, 3, 8), (i, answer)
  assert get(address, '/app.js') [::2] == (200, listed['app.js'].read_bytes())
  assert 'a request failed' not in capsys.readouterr().err


def test_it_listens_on_this_machine_alone(address):
  assert address[0] == '127.0.0.1'
  others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {'127.0.0.1', '127.0.1.1'}
  for host in others:
    with pytest.raises(OSError):
      socket.create_connection((host, address[1]), timeout=2).close()
  with pytest.raises(UserError, match=rf'cannot listen on 127.0.0.1:{address[1]}.*another --port'):
    server.open_server({}, port=address[1])
  with pytest.raises(UserError, match='cannot listen'):
    server.open_server({}, port=123456)


def test_it_listens_at_an_address_of_ipv6():
  try:
    socket.create_server(('::1', 0), family=socket.AF_INET6).close()
  except OSError:
    pytest.skip('there is no IPv6 here')
  with server.open_server({}, '::1') as running:
    assert running.url == f'http://[::1]:{running.server_address[1]}/'
  with pytest.raises(UserError, match='cannot listen on no.such.host:0 .*another --host'):
    server.open_server({}, 'no.such.host')


@pytest.mark.parametrize(('text', 'said'), [
    ('{"model": {"type": "WordPiece"}}', 'is of type WordPiece, .*; it reads SentencePiece.*BPE'),
    ('{"model": {', 'is damaged .JSONDecodeError.*; export again$'), ('[]', 'is damaged .TypeError'),
    ('{}', 'is damaged .KeyError')])
def test_a_tokenizer_that_the_page_does_not_read_is_one_line(tmp_path, monkeypatch, text, said):
  monkeypatch.setattr(site, 'runtime', lambda: pytest.fail('nothing is to be fetched for it'))
  (tmp_path / 'tokenizer.json').write_text(text)
  with pytest.raises(UserError, match=f"^the export's 'tokenizer.json' {said}"):
    site.files(types.SimpleNamespace(files={'tokenizer': tmp_path / 'tokenizer.json'}))


def test_a_bundle_is_the_same_files(listed, tmp_path):
  size = site.bundle(listed, tmp_path / 'site')
  found = {str(path.relative_to(tmp_path / 'site')): path for path in (tmp_path / 'site').rglob('*') if path.is_file()}
  assert set(found) == set(listed) and size == sum(path.stat().st_size for path in found.values())
  assert all(found[name].read_bytes() == file.read_bytes() for name, file in listed.items())
  with pytest.raises(UserError, match='new or an empty folder'):
    site.bundle(listed, tmp_path / 'site')


def test_without_a_network_the_runtime_is_one_clear_line(tmp_path, monkeypatch):
  from lightclip_jax.data.datasets import npm

  def refuse(packages, folder):
    assert packages == {'onnxruntime-web': site.RUNTIME[1]}
    raise UserError('cannot fetch')
  monkeypatch.setattr(npm, 'fetch', refuse)
  monkeypatch.setenv('LIGHTCLIP_DATA', str(tmp_path / 'cache'))
  with pytest.raises(UserError, match='cannot fetch'):
    site.runtime()
  assert not list((tmp_path / 'cache').iterdir())   # the next one tries again

  def fetched(packages, folder):
    dist = folder / 'node_modules/onnxruntime-web/dist'
    dist.mkdir(parents=True)
    for name in (*site._RUNTIME_FILES, 'large.map'):
      (dist / name).write_text(name)
    return folder / 'node_modules'
  monkeypatch.setattr(npm, 'fetch', fetched)
  folder = site.runtime()
  monkeypatch.setattr(npm, 'fetch', refuse)
  assert site.runtime() == folder and sorted(path.name for path in folder.iterdir()) == sorted(site._RUNTIME_FILES)
  assert [path for path in pathlib.Path(tmp_path / 'cache').iterdir()] == [folder]
