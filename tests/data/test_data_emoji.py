"""The join of names and drawings, the splits and the rendering of the built-in emoji data set."""
import collections
import hashlib

import cv2
import numpy as np
import pytest

from lightclip_jax.data import manifest, pipeline, tokenizers, transforms
from lightclip_jax.data.datasets import emoji, npm, render
from lightclip_jax.errors import UserError

SISTERS = [('noto', 'noto-v1'), ('emojione', 'emojione-v1', 'emojione-monotone'),
           ('fluent-emoji', 'fluent-emoji-flat', 'fluent-emoji-high-contrast')]


def test_join_finds_concepts_by_codepoint_name_and_nickname(emoji_packages):
  drawings = emoji.load_drawings(emoji_packages)
  found = {(d.style, d.icon): d.concept.name for d in drawings}
  assert found['noto', 'icon-3'] == 'thing ad'
  assert found['twemoji', 'thing-ad'] == 'thing ad'
  assert found['fxemoji', 'nickname'] == 'thing aa'
  assert found['fxemoji', 'thingab-2'] == 'thing ab'
  assert len([d for d in drawings if d.style == 'fxemoji']) == 2      # "nonsense" has no concept
  assert not any(d.concept.name in ('red hair', 'regional indicator A') for d in drawings)
  assert max(collections.Counter((d.style, d.concept.name) for d in drawings).values()) == 1


def test_captions_start_with_the_name_and_do_not_repeat():
  concept = emoji.Concept('house', '1f3e0', ('House', 'home', 'building'), 'travel & places', 'buildings')
  texts = emoji.captions(concept)
  assert texts[0] == 'house' and len(set(texts)) == len(texts) >= 6
  assert 'house, home' in texts and 'house (travel & places)' in texts
  allowed = set('house home building buildings travel places'.split())
  assert all(set(text.replace(',', ' ').replace('&', ' ').replace('(', ' ').replace(')', ' ').split()) <= allowed
             for text in texts)


def test_split_rules():
  names = [f'concept {i}' for i in range(3000)]
  for name in names:
    assert emoji.split_of(name, 'openmoji') == 'heldout_style'
    heldout = int(hashlib.md5(name.encode()).hexdigest(), 16) % 10 == 0
    others = {emoji.split_of(name, style) for style in emoji.STYLES if style != 'openmoji'}
    assert (others == {'heldout_concepts'}) if heldout else ('heldout_concepts' not in others)
    for sisters in SISTERS:
      assert len({emoji.split_of(name, style) for style in sisters}) == 1
  images = collections.Counter(emoji.split_of(name, 'twemoji') for name in names)
  assert 0.07 < images['heldout_images'] / len(names) < 0.11           # a tenth of nine tenths
  assert any(emoji.split_of(n, 'twemoji') != emoji.split_of(n, 'noto') for n in names)   # families are drawn apart


def test_all_sister_styles_share_a_family():
  families = collections.defaultdict(set)
  for style, (_, family) in emoji.STYLES.items():
    families[family].add(style)
  assert [set(s) for s in SISTERS] == [families[f] for f in ('noto', 'emojione', 'fluent')]


def test_render_is_on_white_and_lossless():
  svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect x="4" y="4" width="8" height="8" '
         'fill="#0a64c8"/></svg>')
  image = transforms.decode(render.render(svg, 32))
  expected = np.full((32, 32, 3), 255, np.uint8)
  expected[8:24, 8:24] = (10, 100, 200)
  np.testing.assert_array_equal(image, expected)


def test_wide_drawings_become_square_and_keep_their_shape():
  svg = emoji.svg_of({'icons': {'a': {'body': '<circle cx="8" cy="4" r="4"/>', 'width': 16, 'height': 8}}}, 'a')
  dark = transforms.decode(render.render(svg, 64))[..., 0] < 128
  rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
  assert abs(len(rows) - len(columns)) <= 1 and abs(rows.mean() - 31.5) <= 1 and abs(columns.mean() - 31.5) <= 1


def test_written_twice_is_equal_whatever_the_processes(emoji_packages, tmp_path):
  drawings = emoji.load_drawings(emoji_packages)
  made = []
  for name, workers in (('one', 1), ('two', 2)):
    (tmp_path / name).mkdir()
    emoji.write(tmp_path / name, drawings, 16, workers)
    made.append(manifest.load(tmp_path / name))
  assert made[0] == made[1]
  assert sum(split.count for split in made[0].splits.values()) == len(drawings)


def test_manifest_and_tokenizer_say_what_is_there(emoji_packages, tmp_path):
  folder = tmp_path / 'out'
  folder.mkdir()
  emoji.write(folder, emoji.load_drawings(emoji_packages), 16, 1)
  made = manifest.load(folder)
  assert len(made.concepts) == 40 and made.groups == ('people & body', 'smileys & emotion')
  assert made.licences == dict.fromkeys(emoji.STYLES, 'MIT') and made.packages == emoji.PACKAGES
  for file, digest in made.sha256.items():
    assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
  records = {split: pipeline.evaluation_records(folder, split) for split in made.splits}
  keys = [record.key for split in records.values() for record in split]
  assert len(keys) == len(set(keys))
  assert {r.style for r in records['heldout_style']} == {'openmoji'}
  trained = {r.concept for r in records['train']}
  assert not trained & {r.concept for r in records['heldout_concepts']}
  texts = {split: {c for r in records[split] for c in r.captions} for split in ('train', 'heldout_concepts')}
  tokenizer = tokenizers.load(folder / made.tokenizer)
  assert texts['heldout_concepts'] - texts['train'] and tokenizer.vocab_size <= emoji.VOCAB_SIZE


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
  monkeypatch.setenv('npm_config_registry', 'http://127.0.0.1:9/')
  with pytest.raises(UserError, match='check the network') as error:
    npm.fetch({'no-such-package': '1.0.0'}, tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.slow
def test_the_real_data_set(tmp_path):
  folder = tmp_path / 'emoji'
  try:
    emoji.prepare(folder, size=32)
  except UserError as error:
    pytest.skip(str(error))
  made = manifest.load(folder)
  assert len(made.concepts) == 1914 and len(made.groups) == 9 and made.splits['heldout_style'].count == 1914
  assert sum(split.count for split in made.splits.values()) > 16_000
  assert tokenizers.load(folder / made.tokenizer).vocab_size == emoji.VOCAB_SIZE
  seen = {(emoji.STYLES[r.style][1], r.concept) for r in pipeline.evaluation_records(folder, 'train')}
  for record in pipeline.evaluation_records(folder, 'heldout_images'):
    assert (emoji.STYLES[record.style][1], record.concept) not in seen
  assert cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR).shape == (32, 32, 3)
