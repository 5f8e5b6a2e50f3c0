"""What of the large icon collection becomes training pairs, what they are called, and what is left out."""
import pytest

from lightclip_jax.data import manifest, pipeline
from lightclip_jax.data.datasets import emoji, icons, npm
from lightclip_jax.errors import UserError


@pytest.fixture
def found(icon_packages, monkeypatch):
  held = emoji.Concept('heldout thing', '1f3ff', (), 'a', 'b')
  real = emoji.load_names
  monkeypatch.setattr(emoji, 'load_names', lambda folder: ({**real(folder)[0], 'heldoutthing': held}, real(folder)[1]))
  monkeypatch.setattr(emoji, 'is_heldout', lambda name: name == held.name)
  return icons.load_icons(icon_packages)


def test_sets_and_icons_that_are_left_out(found):
  assert {icon.style for icon in found} == {'good', 'flag'}
  assert {icon.name for icon in found if icon.style == 'good'} == {
      'access-time-20-filled', 'home', 'home-outline', 'twotone-leaf', 'nothing', 'broken'}
  assert [icon.name for icon in found if icon.style == 'flag'] == ['de-4x3']


def test_captions_are_words(found):
  captions = {icon.name: icon.captions for icon in found}
  assert captions['access-time-20-filled'] == ('access time', 'access time, filled')
  assert captions['home'] == ('home', 'house', 'home, places, cities')
  assert captions['home-outline'] == ('home', 'home, outline', 'home, places, cities')
  assert captions['twotone-leaf'] == ('leaf', 'leaf, twotone')
  flag = next(icon for icon in found if icon.style == 'flag')
  assert (flag.captions[0], flag.concept, flag.group) == ('flag: Germany', 'flag: Germany', 'people & body')


@pytest.mark.parametrize('name, icons_of_set, expected', [
    ('arrow-up-bold-24', {}, ('arrow up', 'bold')), ('light', {}, ('light', '')), ('24-hours', {}, ('24 hours', '')),
    ('sun-line-duotone', {'suffixes': {'line-duotone': 'Line Duotone', 'duotone': ''}}, ('sun', 'line duotone')),
    ('baseline-sun', {'prefixes': {'baseline': 'Baseline'}}, ('sun', 'baseline')), ('baseline-sun', {}, ('baseline sun', ''))])
def test_words_of_a_name(name, icons_of_set, expected):
  assert icons.words(name, icons_of_set) == expected


def test_written_beside_emoji_whatever_the_processes(icon_packages, tmp_path):
  drawings, found = emoji.load_drawings(icon_packages), icons.load_icons(icon_packages)
  made = []
  for workers in (1, 2):
    (folder := tmp_path / str(workers)).mkdir()
    icons.write(folder, drawings, found, 16, workers)
    made.append(manifest.load(folder))
  (tmp_path / 'emoji').mkdir()
  emoji.write(tmp_path / 'emoji', drawings, 16, 1)
  alone = manifest.load(tmp_path / 'emoji')
  assert made[0] == made[1] and made[0].name == 'icons' and made[0].concepts == alone.concepts
  for split in ('heldout_style', 'heldout_images', 'heldout_concepts'):
    assert made[0].splits[split] == alone.splits[split]
    assert made[0].sha256[alone.splits[split].shards[0]] == alone.sha256[alone.splits[split].shards[0]]
  records = pipeline.evaluation_records(tmp_path / '1', 'train')
  added = {record.key: record for record in records if record.style in ('good', 'flag')}
  assert len(records) == alone.splits['train'].count + len(added)
  assert 'good/home' in added and not {'good/nothing', 'good/broken'} & set(added)   # they leave no mark
  assert made[0].licences['good'] == 'MIT' and all(record.licence == 'MIT' for record in added.values())


@pytest.mark.slow
def test_the_real_collection(tmp_path):
  try:
    packages = npm.fetch(icons.PACKAGES, tmp_path)
  except UserError as error:
    pytest.skip(str(error))
  found = icons.load_icons(packages)
  names, _ = emoji.load_names(packages)
  assert len(found) > 250_000 and len({(icon.style, icon.name) for icon in found}) == len(found)
  assert all(icon.captions and all(icon.captions) and icon.licence for icon in found)
  called = {emoji.slug(icon.captions[0]) for icon in found}
  heldout = {concept.name for concept in names.values() if emoji.is_heldout(concept.name)}
  assert 'home' in called and not called & {emoji.slug(name) for name in heldout}
  assert not {icon.style for icon in found} & {*emoji.STYLES, 'logos', 'simple-icons', 'fa6-brands'}
