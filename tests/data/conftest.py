"""A small data set for the tests of the input pipeline, and tiny packages for those of the data sets emoji and icons."""
import json
import pathlib
import sys

import pytest

from lightclip_jax.data.datasets import shapes

sys.path.append(str(pathlib.Path(__file__).parents[2] / 'benchmarks'))   # `fuzz` runs in the tests, too


@pytest.fixture(scope='session')
def shapes_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data') / 'shapes'
  shapes.prepare(folder, size=32)
  return folder


def _write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value), encoding='utf-8')


@pytest.fixture
def emoji_packages(tmp_path):
  """`node_modules` with 40 concepts; every style draws some of them, each in its own way of naming."""
  from lightclip_jax.data.datasets import emoji
  root = tmp_path / 'node_modules'
  english = root / 'emojibase-data/en'
  labels = [f'thing {chr(97 + i // 26)}{chr(97 + i % 26)}' for i in range(40)]
  rows = [{'label': label, 'hexcode': f'{0x1F300 + i:X}-FE0F', 'tags': ['tag', f'word{i}'], 'group': i % 2,
           'subgroup': 3}
          for i, label in enumerate(labels)]
  _write(english / 'data.json', [*rows, {'label': 'red hair', 'hexcode': '1F9B0', 'group': 2, 'subgroup': 3},
                                 {'label': 'regional indicator A', 'hexcode': '1F1E6'}])
  _write(english / 'messages.json', {
      'groups': [{'order': i, 'message': m} for i, m in enumerate(['smileys & emotion', 'people & body', 'component'])],
      'subgroups': [{'order': 3, 'message': 'odd things'}], 'skinTones': []})
  for file in ('cldr', 'emojibase', 'github', 'iamcal', 'joypixels'):
    _write(english / f'shortcodes/{file}.json', {'1F300': ['nickname'] if file == 'github' else 'other'})
  for number, style in enumerate(emoji.STYLES):
    folder = root / '@iconify-json' / style
    body = f'<circle cx="8" cy="8" r="{2 + number / 2}" fill="#00{number:x}"/>'
    icons = {label.replace(' ', '-'): {'body': body} for label in labels}
    if style == 'noto':
      icons = {f'icon-{i}': {'body': body, 'width': 20} for i in range(40)} | {'red-hair': {'body': body}}
      _write(folder / 'chars.json', {f'{0x1F300 + i:x}': f'icon-{i}' for i in range(40)} | {'1f9b0': 'red-hair'})
    if style == 'fxemoji':
      icons = {'nickname': {'body': body}, 'nonsense': {'body': body}, 'thingab-2': {'body': body}}
    _write(folder / 'icons.json', {'icons': icons, 'width': 16, 'height': 16})
    _write(folder / 'info.json', {'license': {'spdx': 'MIT'}})
  return root


@pytest.fixture
def icon_packages(emoji_packages):
  """`emoji_packages`, and a collection of sets: one of icons, one of flags, and some that are not to be used."""
  german = {'label': 'flag: Germany', 'hexcode': '1F1E9-1F1EA', 'tags': ['DE'], 'group': 1, 'subgroup': 3}
  file = emoji_packages / 'emojibase-data/en/data.json'
  _write(file, [*json.loads(file.read_text(encoding='utf-8')), german])
  folder = emoji_packages / '@iconify/json/json'
  dot = {'body': '<circle cx="8" cy="8" r="4"/>'}
  names = ('access-time-20-filled', 'home', 'home-outline', 'twotone-leaf', 'brand-home', 'github', '123', 'heldout-thing')
  for style, category, licence in (
      ('good', 'Thematic', {'spdx': 'MIT'}), ('noncommercial', 'Thematic', {'spdx': 'CC-BY-NC-4.0'}),
      ('gnu', 'Thematic', {'spdx': 'GPL-3.0'}), ('signs', 'Logos', {'spdx': 'MIT'}), ('tools', 'Programming', {'spdx': 'MIT'}),
      ('fa-brands', 'Archive', {'spdx': 'MIT'}), ('noto', 'Emoji', {'spdx': 'MIT'}), ('unclear', 'Thematic', {})):
    _write(folder / f'{style}.json', {
        'info': {'name': style, 'category': category, 'license': licence},
        'icons': {name: dot for name in names} | {
            'hidden': {**dot, 'hidden': True}, 'nothing': {'body': '<path d=""/>'}, 'broken': {'body': '<path'}},
        'aliases': {'house': {'parent': 'home'}, 'turned': {'parent': 'home', 'rotate': 1}},
        'categories': {'Places / Cities': ['home', 'home-outline'], 'Brand / Logo': ['github']},
        'prefixes': {'twotone': 'Two-Tone'}, 'width': 16, 'height': 16})
  _write(folder / 'flag.json', {
      'info': {'name': 'flag', 'category': 'Flags / Maps', 'license': {'spdx': 'MIT'}},
      'icons': {'de-4x3': {**dot, 'width': 20}, 'xx': dot, 'us-ca': dot}})
  return emoji_packages
