"""The built-in data set `shapes`: coloured shapes with captions, made in seconds without a network."""
import itertools
import pathlib

import cv2
import numpy as np

from lightclip_jax.data import writer
from lightclip_jax.data.records import Record

COLOURS = {'red': (220, 30, 30), 'green': (30, 160, 60), 'blue': (40, 70, 220), 'yellow': (240, 210, 40),
           'purple': (140, 50, 170), 'black': (20, 20, 20)}
SHAPES = ('circle', 'square', 'triangle', 'ring', 'cross', 'bar')
PLACES = {'left': 0.35, 'middle': 0.5, 'right': 0.65}
STYLES = ('plain', 'grey', 'noisy', 'small')         # how it is drawn; the last one is the held-out style
_LICENCE = 'Apache-2.0'


def prepare(out: pathlib.Path, size: int = 64, workers: int | None = None) -> None:
  """Makes the data set in the new folder `out`, or does nothing if it is there; `workers` is unused.

  Concepts are colour and shape ("red circle"), groups are shapes. Every seventh concept is held out, as are all
  drawings in the style `small` and, as held-out images, the grey ones in the middle.
  """
  del workers
  with writer.new_folder(out) as folder:
    if folder is None:
      return
    splits: dict[str, list[Record]] = {name: [] for name in
                                       ('train', 'heldout_images', 'heldout_style', 'heldout_concepts')}
    for number, (shape, colour) in enumerate(itertools.product(SHAPES, COLOURS)):
      for style, place in itertools.product(STYLES, PLACES):
        heldout = number % 7 == 0
        split = ('heldout_style' if style == STYLES[-1] else 'heldout_concepts' if heldout else
                 'heldout_images' if (style, place) == ('grey', 'middle') else 'train')
        splits[split].append(_record(shape, colour, style, place, size))
    concepts = tuple(sorted(f'{colour} {shape}' for shape, colour in itertools.product(SHAPES, COLOURS)))
    writer.write(folder, splits, writer.About(
        name='shapes', image_size=size, vocab_size=128, concepts=concepts, groups=tuple(sorted(SHAPES)),
        licences=dict.fromkeys(STYLES, _LICENCE)))


def _record(shape: str, colour: str, style: str, place: str, size: int) -> Record:
  name = f'{colour} {shape}'
  captions = (name, f'a {name}', f'a {shape} that is {colour}', f'a {colour} {shape} on the {place}',
              f'{name}, {shape}s')
  image = draw(shape, COLOURS[colour], style, PLACES[place], size)
  png = cv2.imencode('.png', image[..., ::-1])[1].tobytes()
  return Record(f'{style}/{name}/{place}', png, captions, style, name, shape, _LICENCE)


def draw(shape: str, colour: tuple[int, int, int], style: str, x: float, size: int) -> np.ndarray:
  """uint8 RGB [size, size, 3] of one shape; `x` is the fraction of the width at which its middle lies."""
  ground = 170 if style == 'grey' else 255
  image = np.full((size, size, 3), ground, np.uint8)
  radius = int(size * (0.16 if style == 'small' else 0.26))
  middle = np.array([int(x * size), size // 2])
  thick = max(2, radius // 2)
  if shape in ('circle', 'ring'):
    cv2.circle(image, middle.tolist(), radius, colour, -1 if shape == 'circle' else thick)
  elif shape == 'triangle':
    cv2.fillPoly(image, [middle + np.array([(0, -radius), (radius, radius), (-radius, radius)])], colour)
  else:
    arms = {'square': [(radius, radius)], 'bar': [(radius, thick // 2)],
            'cross': [(radius, thick // 2), (thick // 2, radius)]}[shape]
    for arm in arms:
      cv2.rectangle(image, (middle - arm).tolist(), (middle + arm).tolist(), colour, -1)
  if style == 'noisy':
    noise = np.random.default_rng(0).integers(-40, 41, image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
  return image
