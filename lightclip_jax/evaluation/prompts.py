"""Prompt templates for zero-shot classification; `{}` is where the class name goes.

Each set matches how the names stand in that data's captions. Few templates with different meanings do nearly as well
as CLIP's eighty, at a fraction of the text tower's work.
"""
import dataclasses
import json

from lightclip_jax import storage
from lightclip_jax.errors import UserError

Templates = tuple[str, ...]

TEMPLATES: dict[str, Templates] = {
  'name': ('{}',),   # the name alone was itself a caption in training (emoji, icons)
  'photo': ('a photo of a {}.', 'a close-up photo of a {}.', 'a photo of many {}.', 'a drawing of a {}.',
            'a small {} in the distance.', 'part of a {}.', '{}'),
  'digit': ('the digit {}', 'the number {}', 'a photo of the number {}.'),
  'texture': ('a photo of a {} texture.', 'a photo of a {} pattern.', 'something {}'),
  'satellite': ('a satellite photo of {}.', 'an aerial photo of {}.'),
}


@dataclasses.dataclass(frozen=True)
class Choice:
  """Templates in place of the tasks' own: for some image sets by name, or (under '') for all others."""
  name: str = ''
  templates: tuple[tuple[str, Templates], ...] = ()

  def resolve(self, own: str, data: str) -> tuple[str, Templates]:
    """(name of the set, its templates) for an image set called `data` whose own template set is `own`."""
    chosen = dict(self.templates)
    for key in (data, ''):
      if key in chosen:
        return f'{self.name}:{key}'.rstrip(':'), chosen[key]
    return own, templates(own)


OWN = Choice()


def templates(name: str) -> Templates:
  """The template set called `name`.

  Raises:
    UserError: for an unknown set, with the list.
  """
  if name not in TEMPLATES:
    raise UserError(f'unknown prompt set {name!r}; there are {", ".join(sorted(TEMPLATES))}')
  return TEMPLATES[name]


def choose(name_or_file: str | None) -> Choice:
  """A template set by name, or of a JSON file: a list of templates, or {image set: list of templates}; None: the tasks' own.

  Raises:
    UserError: for an unknown set, or a file that is something else.
  """
  if not name_or_file:
    return OWN
  if not name_or_file.endswith('.json'):
    return Choice(name_or_file, (('', templates(name_or_file)),))
  path = storage.path(name_or_file)
  try:
    read = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read the prompts {name_or_file!r}: {error}') from error
  sets = read if isinstance(read, dict) else {'': read}
  for key, value in sets.items():
    if not isinstance(value, list) or not value or any(not isinstance(t, str) or t.count('{}') != 1 for t in value):
      raise UserError(f'the prompts {name_or_file!r}{f" for {key!r}" if key else ""} are {str(value)[:60]}; '
                      'they must be a list of texts with {} once each')
  return Choice(path.stem, tuple((key, tuple(value)) for key, value in sets.items()))
