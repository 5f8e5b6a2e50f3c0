"""Pictures of two to four things on a grid, with a caption whose words have known places.

Letters: S pixels, W text positions.
"""
import dataclasses
import re

import numpy as np

from lightclip_jax.data import tokenizers, transforms
from lightclip_jax.data.records import Record
from lightclip_jax.data.tokenizers import Tokenizer
from lightclip_jax.evaluation.matching import join_pieces

GRID = transforms.GRID                  # cells along each side
FEWEST, MOST = 2, GRID * GRID           # things
_PLAIN_NAME = re.compile(r'[a-z]+( [a-z]+)?')   # words that every tokenizer splits at blanks only


@dataclasses.dataclass(frozen=True)
class Scene:
  """One picture. `places[k]` are the text positions of thing k's name, and `cells[k]` = (row, column) is where it stands."""
  image: np.ndarray                     # uint8 [S, S, 3]
  caption: str
  tokens: np.ndarray                    # int32 [W]
  names: tuple[str, ...]
  cells: tuple[tuple[int, int], ...]
  places: tuple[tuple[int, ...], ...]


def compose(records: list[Record], tokenizer: Tokenizer, *, size: int, context: int, count: int, seed: int = 0) -> list[Scene]:
  """Up to `count` scenes of things with short plain names, drawn at random from the records; the same ones for a seed.

  Two, three and four things take turns. A caption that the context would cut loses its last things; where not even two
  fit, others are drawn (and none are found for a context too short for any).

  Args:
    records: of one split; each concept once or more.
    tokenizer: the model's.
    size: S.
    context: W.
    count: scenes.
    seed: decides all that is random.
  """
  named = [record for record in records if _PLAIN_NAME.fullmatch(record.concept)]
  rng, scenes = np.random.default_rng(seed), []
  for _ in range(4 * count):
    wanted = FEWEST + len(scenes) % (MOST - FEWEST + 1)
    order = rng.permutation(len(named))[:wanted]
    cells = [divmod(int(cell), GRID) for cell in rng.permutation(GRID * GRID)[:wanted]]
    chosen = [named[i] for i in order]
    if len({record.concept for record in chosen}) < wanted:
      continue
    if (scene := _scene(chosen, cells, tokenizer, size, context)) is not None:
      scenes.append(scene)
    if len(scenes) == count:
      break
  return scenes


def caption_of(names: list[str]) -> tuple[str, list[list[int]]]:
  """"a red apple and a dog", and for each name the numbers of its words in it."""
  words: list[str] = []
  numbers = []
  for name in names:
    words += [*(['and'] if words else []), 'an' if name[0] in 'aeiou' else 'a']
    numbers.append(list(range(len(words), len(words) + len(name.split()))))
    words += name.split()
  return ' '.join(words), numbers


def _scene(records: list[Record], cells: list[tuple[int, int]], tokenizer: Tokenizer, size: int,
           context: int) -> Scene | None:
  for kept in range(len(records), FEWEST - 1, -1):
    names = [record.concept for record in records[:kept]]
    caption, numbers = caption_of(names)
    tokens_W = tokenizer.encode([caption], context)[0]
    positions = np.flatnonzero(tokenizer.word_mask(tokens_W))
    words = [list(word) for word in join_pieces(tokenizer.pieces(tokens_W[positions]))]
    if tokenizers.fits(tokenizer, caption, context) and len(words) == len(caption.split()):
      places = tuple(tuple(int(positions[i]) for number in of_name for i in words[number]) for of_name in numbers)
      return Scene(draw(records[:kept], cells[:kept], size), caption, tokens_W, tuple(names), tuple(cells[:kept]), places)
  return None


def draw(records: list[Record], cells: list[tuple[int, int]], size: int) -> np.ndarray:
  """uint8 [S, S, 3]: each image fills its cell of the grid; white elsewhere."""
  images = (transforms.evaluation_transform(transforms.decode(record.image, None), size // GRID) for record in records)
  return transforms.mosaic(list(images), cells, size)
