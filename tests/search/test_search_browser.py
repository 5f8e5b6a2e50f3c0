"""The page in a real browser: pictures in, words typed, the right one first; the numbers are Python's. """
import functools
import http.server
import os
import shutil
import threading

import chromium
import colour_export
import numpy as np
import PIL.Image
import pytest

from lightclip_jax.errors import UserError
from lightclip_jax.search import pictures, server, site, towers

STATE = "import(new URL('app.js', location.href))"


@pytest.fixture(scope='module')
def listed(export_folder):
  """The files of the page. Without a browser or a network the tests are skipped, unless LIGHTCLIP_BROWSER=required is set."""
  missing = pytest.fail if os.environ.get('LIGHTCLIP_BROWSER') == 'required' else pytest.skip
  if chromium.program() is None:
    missing(f'there is no Chromium ({", ".join(chromium.NAMES)}): apt-get install chromium')
  try:
    return site.files(towers.Export(export_folder))
  except UserError as error:
    missing(str(error))


@pytest.fixture(scope='module')
def served(listed):
  """The address of the page."""
  with server.open_server(listed) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running.url
    running.shutdown()


@pytest.fixture(scope='module')
def page(served, tmp_path_factory):
  with chromium.open_page(tmp_path_factory.mktemp('profile')) as page:
    page.open(served)
    page.wait("document.querySelector('#query').disabled === false")
    yield page


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('browser')
  made = colour_export.pictures(folder, 100)
  (folder / 'cut.png').write_bytes(next(iter(made)).read_bytes()[:200])
  return made, folder


def names(page):
  return page.run("[...document.querySelectorAll('#results i')].map(name => name.textContent)")


def type_query(page, text):
  page.run("document.querySelector('#query').select(); document.querySelector('#query').focus()")
  page.type(text)
  page.wait(f"document.querySelector('#status').textContent.includes('“{text}”')")


def test_a_person_finds_the_picture(page, files):
  made, folder = files
  page.give_files('#add-pictures', [*made, folder / 'cut.png'])
  page.wait("document.querySelector('#working').hidden && document.querySelector('#status').textContent.includes('of 100 ')")
  assert page.run("document.querySelector('#failures').innerText").startswith('1 file could not be read')
  assert 'cut.png' in page.run("document.querySelector('#failures').textContent")
  by_name = {file.name: colour for file, colour in made.items()}
  for colour in ('green', 'purple'):
    type_query(page, f'a {colour} picture')
    assert [by_name[name] for name in names(page)[:12]] == [colour] * 12
  page.press('ArrowDown')   # by keyboard: to the first answer, open it, close it
  page.press('Enter')
  page.wait("document.querySelector('#picked').open")
  assert by_name[page.run("document.querySelector('#picked-name').textContent")] == 'purple'
  page.run("document.querySelector('#labels').focus()")
  page.type('green, purple, a white house')
  page.wait("document.querySelectorAll('#guesses li').length === 3")
  assert page.run("document.querySelector('#guesses li span').textContent") == 'purple'
  page.press('Escape')
  page.wait("!document.querySelector('#picked').open")
  yellow = next(file for file, colour in made.items() if colour == 'yellow')
  page.give_files('#by-picture', [yellow])
  page.wait(f"document.querySelector('#status').textContent.includes('to {yellow.name} first')")
  assert names(page)[0] == yellow.name and by_name[names(page)[8]] == 'yellow'


def test_arrows_belong_to_the_input_method_while_it_composes(page, files):
  page.run("document.querySelector('#query').focus()")
  key = "new KeyboardEvent('keydown', {{key: 'ArrowDown', bubbles: true, cancelable: true, isComposing: {}}})"
  for composing, place in (('true', 'INPUT'), ('false', 'BUTTON')):
    free = page.run(f"document.querySelector('#query').dispatchEvent({key.format(composing)})")
    assert (free, page.run('document.activeElement.tagName')) == (composing == 'true', place)


def test_words_are_found_in_the_picture(page, files):
  half = np.zeros((60, 60, 3), np.uint8)
  half[:, :30], half[:, 30:] = (255, 0, 0), (0, 0, 255)
  PIL.Image.fromarray(half).save(files[1] / 'half.png')
  page.give_files('#add-pictures', [files[1] / 'half.png'])
  page.wait("document.querySelector('#working').hidden && document.querySelector('#status').textContent.includes('of 101')")
  found = page.run(STATE + ".then(app => app.towers.ask('match', {file: app.library.files.at(-1), text: 'red blue'}))")
  assert [word['word'] for word in found['words']] == ['red', 'blue'] and found['grid'] == colour_export.GRID
  red, blue = (np.reshape(word['heat'], (4, 4)) for word in found['words'])
  assert red[:, :2].sum() > 0.95 and blue[:, 2:].sum() > 0.95


def test_embeddings_are_pythons(page, files, export_folder):
  export, made = towers.Export(export_folder), list(files[0])
  flat = page.run(STATE + '.then(app => Array.from(app.library.vectors.subarray(0, 100 * app.towers.dim)))')
  expected = export.image_tower()(np.stack([pictures.read(file, export.size) for file in made]))
  cosines = (np.reshape(flat, expected.shape) * expected).sum(axis=1)
  assert cosines.min() > 0.9999
  texts = [f'{word} {caption}' for word in ('a', 'the', '家族', 'ÉTÉ') for caption in colour_export.CAPTIONS[:25]]
  flat = page.run(STATE + f".then(app => app.towers.ask('texts', {texts})).then(x => Array.from(x))")
  expected = export.encode_text(texts)
  assert (np.reshape(flat, expected.shape) * expected).sum(axis=1).min() > 0.99999


def test_folders_chosen_and_dropped(page, files):
  page.give_files('#add-folder', [files[1] / '0'])   # the browser gives its paths, so these are new
  page.wait("document.querySelector('#status').textContent.includes('of 135')")
  page.drop(files[1] / '1', 300, 400)
  page.wait("document.querySelector('#status').textContent.includes('of 168')")
  assert page.run(STATE + ".then(app => app.library.files.at(-1).fromFolder)").startswith('1/')
  page.drop(files[1] / '1', 300, 400)
  page.wait("document.querySelector('#status').textContent.includes('no picture among these')")


UNREADABLE = """(() => {
  const refused = (_, reject) => reject(new DOMException('no permission', 'NotReadableError'));
  const file = (name, give) => ({isFile: true, fullPath: `/mixed/${name}`, file: give});
  const folder = (fullPath, ...lots) => ({fullPath, createReader: () => ({
    readEntries: (resolve, reject) => lots.length ? lots.shift()(resolve, reject) : resolve([])})});
  const good = name => file(name, resolve => resolve(new File([`no picture ${name}`], name, {lastModified: 1})));
  const inner = [good('one.png'), file('bad.png', refused), folder('/mixed/locked', refused)];
  const entry = folder('/mixed', resolve => resolve(inner), resolve => resolve([good('two.png')]), refused);
  const drop = new Event('drop', {cancelable: true});
  document.dispatchEvent(Object.assign(drop, {dataTransfer: {items: [{webkitGetAsEntry: () => entry}]}}));
})()"""


def test_one_unreadable_entry_does_not_cost_the_folder(page):
  """Entries as a browser gives them: a file and a folder that it may not read, and a reader that fails after its second lot."""
  shown = "[...document.querySelectorAll('#failures li')].map(line => line.textContent)"
  before = len(page.run(shown))
  page.run(UNREADABLE)
  page.wait(f'{shown}.length === {before + 5}')
  lines = page.run(shown)[before:]   # one.png and two.png were read, and the model's worker says that they are no pictures
  names = ['mixed', *(f'mixed/{name}' for name in ('bad.png', 'locked', 'one.png', 'two.png'))]
  assert sorted(line.split(':')[0] for line in lines) == names
  assert sum('no permission' in line for line in lines) == 3
  page.run(UNREADABLE)
  page.wait("document.querySelector('#status').textContent.includes('no picture among these')")
  assert len(page.run(shown)) == before + 5


def test_a_narrow_screen_and_the_dark(page):
  for width, dark in ((360, False), (1200, True)):
    page.resize(width, 740, dark)
    assert page.run('document.documentElement.scrollWidth') <= width
    background = page.run('getComputedStyle(document.body).backgroundColor')
    assert (max(int(part) for part in background[4:-1].split(',')) < 64) == dark


def test_nothing_failed_and_nothing_left_the_machine(page, served):
  assert page.errors == []
  assert {request.split('/')[2] for request in page.requests if request.startswith('http')} == {served.split('/')[2]}
  assert all(request.startswith((served, f'blob:{served}', 'about:', 'data:')) for request in page.requests)


class Quiet(http.server.SimpleHTTPRequestHandler):
  """Any web server, without our headers."""

  def log_message(self, *_):
    pass


def test_what_is_dropped_before_the_model_has_loaded_is_read_then(listed, files, tmp_path):
  loaded = threading.Event()

  class Slow(Quiet):
    def translate_path(self, path):
      name = path.split('?')[0].lstrip('/') or 'index.html'
      assert not name.startswith('model/') or loaded.wait(60)
      return str(listed[name])

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Slow) as plain:
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    with chromium.open_page(tmp_path / 'profile') as page:
      page.open(f'http://127.0.0.1:{plain.server_address[1]}/')
      page.wait("document.querySelector('#model') && document.readyState === 'complete'")   # its script has run
      page.drop(files[1] / '2', 300, 400)
      page.wait("document.querySelector('#status').textContent.includes('when the model has loaded')", 10)
      loaded.set()
      page.wait("document.querySelector('#status').textContent.startsWith('33 pictures')")
    plain.shutdown()


def test_a_bundle_works_elsewhere_and_says_what_is_wrong(listed, tmp_path):
  site.bundle(listed, tmp_path / 'site')
  handler = functools.partial(Quiet, directory=str(tmp_path / 'site'))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as plain:
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    with chromium.open_page(tmp_path / 'profile') as page:
      page.open(f'http://127.0.0.1:{plain.server_address[1]}/')
      page.wait("document.querySelector('#query').disabled === false")
      (tmp_path / 'site/model/text.onnx').write_bytes(b'no model')
      page.open(f'http://127.0.0.1:{plain.server_address[1]}/?')
      page.wait("document.querySelector('#model.failed')")
      assert 'The model cannot be loaded' in page.run("document.querySelector('#model').textContent")
      assert page.run("document.querySelector('#query').disabled")
    plain.shutdown()
  shutil.rmtree(tmp_path / 'site')   # 56 MB, which pytest would keep
