"""Prompt templates for zero-shot classification; `{}` is where the class name goes.

Each set matches how the names stand in that data's captions. Few templates with different meanings do nearly as well
as CLIP's eighty, at a fraction of the text tower's work.
"""
from lightclip_jax.errors import UserError

TEMPLATES: dict[str, tuple[str, ...]] = {
  'name': ('{}',),   # the name alone was itself a caption in training (emoji, icons)
  'photo': ('a photo of a {}.', 'a close-up photo of a {}.', 'a photo of many {}.', 'a drawing of a {}.',
            'a small {} in the distance.', 'part of a {}.', '{}'),
}


def templates(name: str) -> tuple[str, ...]:
  """The template set called `name`.

  Raises:
    UserError: for an unknown set, with the list.
  """
  if name not in TEMPLATES:
    raise UserError(f'unknown prompt set {name!r}; there are {", ".join(sorted(TEMPLATES))}')
  return TEMPLATES[name]
