"""The built-in data set `icons`: `emoji`, and in its training split some hundreds of thousands of icons with their names.

They are the sets of the npm package `@iconify/json`, but for emoji, logos and brands (trademarks), and licences that forbid
commercial use or ask for the GPL. The held-out splits are emoji's; what bears the name of a held-out concept is left out.
"""
import dataclasses
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from lightclip_jax.data import writer
from lightclip_jax.data.datasets import emoji, npm, render
from lightclip_jax.data.records import Record

COLLECTION = '@iconify/json'
PACKAGES = {**emoji.PACKAGES, COLLECTION: '2.2.535'}
VOCAB_SIZE = 8192
FLAGS = ('cif', 'circle-flags', 'flag', 'flagpack')   # their names are the countries' codes
_REFUSED_LICENCE = re.compile(r'-NC\b|GPL')
_REFUSED_CATEGORY = ('Emoji', 'Logos', 'Programming')   # the last are mostly the tools' logos
_BRAND = re.compile(r'(^|[-_ /])(brand|logo)s?($|[-_ /])', re.IGNORECASE)
# How sets say in which weight, size or manner they draw the same thing.
_MANNER = re.compile(r'(-(\d+(px|x\d+)?|v\d|alt|bold|broken|duotone|fill(ed)?|light|line(ar)?|negative|outlined?|regular|'
                     r'round(ed)?|sharp|solid|thin|twotone))+$')


@dataclasses.dataclass(frozen=True)
class Icon:
  """A drawing not yet rendered, and what is true of it."""
  name: str
  style: str
  licence: str
  svg: str
  captions: tuple[str, ...]
  concept: str = ''
  group: str = ''


def prepare(out: pathlib.Path, size: int = 128, workers: int | None = None) -> None:
  """Makes the data set in the new folder `out`, or does nothing if it is there; takes and raises what `emoji.prepare` does."""
  with writer.new_folder(out) as folder:
    if folder is None:
      return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      packages = npm.fetch(PACKAGES, pathlib.Path(temporary))
      drawings, icons = emoji.load_drawings(packages), load_icons(packages)
    write(folder, drawings, icons, size, workers)


def write(folder: pathlib.Path, drawings: list[emoji.Drawing], icons: list[Icon], size: int,
          workers: int | None = None) -> None:
  """Renders all and writes it with its manifest into `folder`. An icon that leaves no mark on white is left out."""
  splits = emoji.records(drawings, size, workers)
  images = render.render_all([icon.svg for icon in icons], size, workers or os.cpu_count() or 1, skip=True)
  drawn = (_record(icon, image) for icon, image in zip(icons, images, strict=True) if image)
  about = emoji.about(drawings, size)
  licences = {**about.licences, **{icon.style: icon.licence for icon in icons}}
  about = dataclasses.replace(about, name='icons', vocab_size=VOCAB_SIZE, packages=PACKAGES, licences=licences)
  writer.write(folder, {**splits, 'train': itertools.chain(splits['train'], drawn)}, about)


def load_icons(packages: pathlib.Path) -> list[Icon]:
  """The icons of the fetched packages, sorted by set and name."""
  names, concepts = emoji.load_names(packages)
  return [icon for path in sorted((packages / COLLECTION / 'json').glob('*.json'))
          for icon in _set(path.stem, json.loads(path.read_text(encoding='utf-8')), names, concepts)]


def _set(style: str, icons: Mapping[str, Any], names: Mapping[str, emoji.Concept],
         concepts: Mapping[str, emoji.Concept]) -> Iterator[Icon]:
  info = icons['info']
  licence = info['license'].get('spdx', '')
  if info.get('category') in _REFUSED_CATEGORY or style in emoji.STYLES or _BRAND.search(style) or not licence or (
      _REFUSED_LICENCE.search(licence)):
    return
  others, categories = _aliases(icons), _categories(icons)
  for name in sorted(icons['icons']):
    found = [category for category in categories.get(name, ()) if not _BRAND.search(category)]
    if icons['icons'][name].get('hidden') or _BRAND.search(name) or len(found) < len(categories.get(name, ())):
      continue
    svg = emoji.svg_of(icons, name)
    if style in FLAGS:
      concept = _country(name, concepts)
      if concept and not emoji.is_heldout(concept.name):
        yield Icon(name, style, licence, svg, emoji.captions(concept), concept.name, concept.group)
      continue
    plain = [words(given, icons) for given in (name, *others.get(name, ()))]
    known = [names.get(emoji.slug(given)) for given, _ in plain]
    if re.search('[a-z]{2}', plain[0][0]) and not any(concept and emoji.is_heldout(concept.name) for concept in known):
      yield Icon(name, style, licence, svg, _captions(plain, found))


def words(name: str, icons: Mapping[str, Any]) -> tuple[str, str]:
  """("access time", "filled") of "access-time-20-filled": what it shows, and how it is drawn ('' where that isn't said)."""
  manner = []
  for start in icons.get('prefixes', ()):
    if start and name.startswith(f'{start}-'):
      manner, name = [start], name.removeprefix(f'{start}-')
  for end in sorted(icons.get('suffixes', ()), key=len, reverse=True):
    if end and name.endswith(f'-{end}'):
      manner, name = [*manner, end], name.removesuffix(f'-{end}')
      break
  stem = _MANNER.sub('', name)
  manner.append(name[len(stem):])
  said = re.findall('[a-z]{3,}', '-'.join(manner))
  return stem.replace('-', ' ').replace('_', ' ').strip(), ' '.join(dict.fromkeys(said))


def _captions(names: list[tuple[str, str]], categories: list[str]) -> tuple[str, ...]:
  """Texts that are true of an icon, without repeats; what it shows first."""
  (name, manner), *others = names
  texts = [name, *(other for other, _ in others[:4] if re.search('[a-z]{2}', other))]
  texts += [f'{name}, {manner}'] if manner else []
  texts += [f'{name}, {category.lower().replace(" / ", ", ")}' for category in categories[:2]]
  return tuple(dict.fromkeys(texts))


def _aliases(icons: Mapping[str, Any]) -> dict[str, list[str]]:
  """Icon -> its other names. Turned and mirrored ones are other pictures."""
  others: dict[str, list[str]] = {}
  for name, alias in sorted(icons.get('aliases', {}).items()):
    if set(alias) == {'parent'}:
      others.setdefault(alias['parent'], []).append(name)
  return others


def _categories(icons: Mapping[str, Any]) -> dict[str, list[str]]:
  categories: dict[str, list[str]] = {}
  for category, members in icons.get('categories', {}).items():
    for name in members:
      categories.setdefault(name, []).append(category)
  return categories


def _country(name: str, concepts: Mapping[str, emoji.Concept]) -> emoji.Concept | None:
  """The flag that a set calls "de", or "de-4x3"."""
  code = re.fullmatch(r'([a-z])([a-z])(-\dx\d)?', name)
  return concepts.get('-'.join(f'{ord(letter) - ord("a") + 0x1F1E6:x}' for letter in code.group(1, 2))) if code else None


def _record(icon: Icon, image: bytes) -> Record:
  return Record(f'{icon.style}/{icon.name}', image, icon.captions, icon.style, icon.concept, icon.group, icon.licence)
