"""The built-in data set `emoji`: some 1,900 concepts, each drawn in up to 12 styles, with many true captions.

Drawings are SVGs of npm packages `@iconify-json/*`; names, keywords and groups are Unicode CLDR's (`emojibase-data`).
"""
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from lightclip_jax.data import writer
from lightclip_jax.data.datasets import npm, render
from lightclip_jax.data.records import Record

CLDR = 'emojibase-data'
# Style -> (version of its package, family). Sister designs share a family; training and test never split them.
STYLES = {
    'noto': ('1.2.9', 'noto'),
    'noto-v1': ('1.2.5', 'noto'),
    'twemoji': ('1.2.5', 'twemoji'),
    'openmoji': ('1.2.29', 'openmoji'),
    'fluent-emoji': ('1.2.7', 'fluent'),
    'fluent-emoji-flat': ('1.2.6', 'fluent'),
    'fluent-emoji-high-contrast': ('1.2.6', 'fluent'),
    'emojione': ('1.2.3', 'emojione'),
    'emojione-v1': ('1.2.3', 'emojione'),
    'emojione-monotone': ('1.2.1', 'emojione'),
    'fxemoji': ('1.2.2', 'fxemoji'),
    'streamline-emojis': ('1.2.4', 'streamline'),
}
PACKAGES = {CLDR: '17.0.0', **{f'@iconify-json/{style}': version for style, (version, _) in STYLES.items()}}
HELDOUT_STYLE = 'openmoji'
SPLITS = ('train', 'heldout_images', 'heldout_style', 'heldout_concepts')
VOCAB_SIZE = 3072
_COMPONENT_GROUP = 2           # hair and skin: parts of other emoji
_NAME_FILES = ('cldr', 'emojibase', 'github', 'iamcal', 'joypixels')   # most trusted first


@dataclasses.dataclass(frozen=True)
class Concept:
  """An emoji, whoever draws it."""
  name: str
  codepoints: str              # "1f3e1"; without variation selectors
  keywords: tuple[str, ...]
  group: str
  subgroup: str


@dataclasses.dataclass(frozen=True)
class Drawing:
  """One concept in one style, not yet rendered."""
  concept: Concept
  style: str
  icon: str
  licence: str
  svg: str


def prepare(out: pathlib.Path, size: int = 128, workers: int | None = None) -> None:
  """Makes the data set in the new folder `out`, or does nothing if it is there.

  Args:
    out: the folder.
    size: pixels of the square images.
    workers: processes that draw; None: one a core.

  Raises:
    UserError: without a network, or if `out` cannot be written.
  """
  with writer.new_folder(out) as folder:
    if folder is None:
      return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      drawings = load_drawings(npm.fetch(PACKAGES, pathlib.Path(temporary)))
    write(folder, drawings, size, workers)


def write(folder: pathlib.Path, drawings: list[Drawing], size: int, workers: int | None = None) -> None:
  """Renders the drawings and writes them with their manifest into `folder`."""
  writer.write(folder, records(drawings, size, workers), about(drawings, size))


def records(drawings: list[Drawing], size: int, workers: int | None = None) -> dict[str, list[Record]]:
  """The drawings rendered, by split."""
  images = render.render_all([drawing.svg for drawing in drawings], size, workers or os.cpu_count() or 1)
  splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
  for drawing, image in zip(drawings, images, strict=True):
    splits[split_of(drawing.concept.name, drawing.style)].append(_record(drawing, image))
  return splits


def about(drawings: list[Drawing], size: int) -> writer.About:
  """What their manifest says."""
  return writer.About(
      name='emoji', image_size=size, vocab_size=VOCAB_SIZE, packages=PACKAGES,
      concepts=tuple(sorted({drawing.concept.name for drawing in drawings})),
      groups=tuple(sorted({drawing.concept.group for drawing in drawings})),
      licences={drawing.style: drawing.licence for drawing in drawings})


def split_of(name: str, style: str) -> str:
  """Where a drawing belongs. Sister designs of a concept always come out alike, so none is seen in training."""
  if style == HELDOUT_STYLE:
    return 'heldout_style'
  if is_heldout(name):
    return 'heldout_concepts'
  return 'heldout_images' if _md5(f'{STYLES[style][1]}/{name}') % 10 == 0 else 'train'


def is_heldout(name: str) -> bool:
  """Whether a concept is never seen in training, whoever draws it."""
  return _md5(name) % 10 == 0


def captions(concept: Concept) -> tuple[str, ...]:
  """Texts that are true of every drawing of the concept, without repeats; the name first."""
  name, words = concept.name, [word for word in concept.keywords if word.lower() != concept.name.lower()]
  place = f'{concept.subgroup}, {concept.group}'
  texts = [name, *(f'{name}, {word}' for word in words[:4])]
  texts += [', '.join(words[i:i + 3]) for i in range(0, min(len(words), 6), 3)]
  texts += [f'{name}, {place}', f'{name} ({concept.group})', ', '.join([*words[:2], place]), place, concept.group]
  return tuple(dict.fromkeys(texts))


def load_drawings(packages: pathlib.Path) -> list[Drawing]:
  """All drawings of all concepts in the fetched packages, sorted by style and name of the icon."""
  names, concepts = load_names(packages)
  return [drawing for style in sorted(STYLES) for drawing in _join(style, packages, concepts, names)]


def load_names(packages: pathlib.Path) -> tuple[dict[str, Concept], dict[str, Concept]]:
  """Concepts by the `slug` of every name that anyone gives them, and by codepoints."""
  concepts = _load_concepts(packages / CLDR)
  return _names(concepts, packages / CLDR, [_load_chars(packages, style) for style in STYLES]), concepts


def _load_concepts(folder: pathlib.Path) -> dict[str, Concept]:
  """Codepoints -> concept. Skin tones are nested in the file, and so left out."""
  texts = {kind: {entry['order']: entry['message'] for entry in entries}
           for kind, entries in _json(folder / 'en/messages.json').items() if kind != 'skinTones'}
  concepts = {}
  for row in _json(folder / 'en/data.json'):
    if row.get('group', _COMPONENT_GROUP) != _COMPONENT_GROUP:
      points = _codepoints(row['hexcode'])
      concepts[points] = Concept(row['label'], points, tuple(row.get('tags', ())),
                                 texts['groups'][row['group']], texts['subgroups'][row['subgroup']])
  return concepts


def _load_chars(packages: pathlib.Path, style: str) -> dict[str, str]:
  """Codepoints -> icon, where the package knows them."""
  chars = packages / '@iconify-json' / style / 'chars.json'
  return _json(chars) if chars.is_file() else {}


def _names(concepts: dict[str, Concept], cldr: pathlib.Path, chars: list[dict[str, str]]) -> dict[str, Concept]:
  """Every way in which a set may name a concept -> that concept; the most trusted way first."""
  names: dict[str, Concept] = {}
  for concept in concepts.values():
    names.setdefault(slug(concept.name), concept)
  for concept in concepts.values():
    names.setdefault(slug(re.sub(r'\(.*\)', '', concept.name)), concept)
  tables = [*chars, *(_json(cldr / f'en/shortcodes/{file}.json') for file in _NAME_FILES)]
  for table in tables:
    for points, given in table.items():
      concept = concepts.get(_codepoints(points))
      for name in [given] if isinstance(given, str) else given:
        if concept:
          names.setdefault(slug(name), concept)
  return names


def _join(style: str, packages: pathlib.Path, concepts: dict[str, Concept], names: dict[str, Concept]) -> list[Drawing]:
  """One drawing for each concept that the style has, by codepoints, else by name, else by name without a number."""
  folder, chars = packages / '@iconify-json' / style, _load_chars(packages, style)
  icons, licence = _json(folder / 'icons.json'), _json(folder / 'info.json')['license']['spdx']
  found: dict[Concept, str] = {}
  for points, icon in sorted(chars.items()):
    if _codepoints(points) in concepts and icon in icons['icons']:
      found.setdefault(concepts[_codepoints(points)], icon)
  taken = set(found.values())
  for spelling in (lambda icon: icon, lambda icon: re.sub(r'-\d$', '', icon).replace('flag-for-', '')):
    for icon in sorted(icons['icons']):
      concept = names.get(slug(spelling(icon)))
      if concept and icon not in taken and concept not in found:
        found[concept] = icon
        taken.add(icon)
  drawings = [Drawing(concept, style, icon, licence, svg_of(icons, icon)) for concept, icon in found.items()]
  return sorted(drawings, key=lambda drawing: drawing.icon)


def svg_of(icons: Mapping[str, Any], name: str) -> str:
  """The document of an icon, square; its own measures win over the set's (iconify's JSON format)."""
  icon = icons['icons'][name]
  left, top, width, height = (icon.get(key, icons.get(key, default)) for key, default in
                              (('left', 0), ('top', 0), ('width', 16), ('height', 16)))
  side = max(width, height)
  return ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
          f'viewBox="{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}">{icon["body"]}</svg>')


def _record(drawing: Drawing, image: bytes) -> Record:
  concept = drawing.concept
  return Record(f'{drawing.style}/{drawing.icon}', image, captions(concept), drawing.style, concept.name, concept.group,
                drawing.licence)


def _codepoints(text: str) -> str:
  return '-'.join(part for part in text.lower().split('-') if part != 'fe0f')


def slug(text: str) -> str:
  """Letters and digits, so that spellings of a name are equal."""
  return re.sub(r'[^a-z0-9]+', '', text.lower().replace('&', 'and').replace('ñ', 'n'))


def _md5(text: str) -> int:
  return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)


def _json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding='utf-8'))
