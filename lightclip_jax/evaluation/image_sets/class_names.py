"""Class names as they stand in prompts: the one table of what is cleaned, for sets whose own names are poor or missing.

ImageNet's are not here: they are read from open_clip's package (tfds_sets.py).
"""
import re

from lightclip_jax.errors import UserError

# Sets whose labels are numbers, or are so in TFDS until the data are prepared: all names, in the order of the labels.
WHOLE = {
  'cifar10': 'airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck',
  'cifar100': (
    'apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus, butterfly, camel, '
    'can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab, crocodile, cup, dinosaur, '
    'dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, '
    'lizard, lobster, man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree, '
    'pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket, rose, sea, '
    'seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar, sunflower, sweet pepper, table, tank, '
    'telephone, television, tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm'),
}
# Single names that say little or mislead: own name -> what is asked for.
PARTS = {
  'eurosat': {'AnnualCrop': 'annual crop land', 'HerbaceousVegetation': 'brushland or shrubland',
              'Highway': 'highway or road', 'Industrial': 'industrial buildings', 'Pasture': 'pasture land',
              'PermanentCrop': 'permanent crop land', 'Residential': 'residential buildings', 'SeaLake': 'sea or lake'},
  'caltech101': {'background_google': 'background', 'faces': 'off-center face', 'faces_easy': 'centered face',
                 'airplanes': 'airplane', 'leopards': 'leopard', 'motorbikes': 'motorbike', 'car_side': 'side of a car',
                 'cougar_body': 'body of a cougar', 'cougar_face': 'face of a cougar', 'crocodile_head': 'head of a crocodile',
                 'flamingo_head': 'head of a flamingo', 'gerenuk': 'gerenuk antelope', 'yin_yang': 'yin and yang symbol',
                 'windsor_chair': 'Windsor chair', 'inline_skate': 'inline skates', 'pigeon': 'pigeon bird'},
  'cars': {'smart fortwo Convertible 2012': 'Smart Fortwo Convertible 2012'},
  'pets': {'english_cocker_spaniel': 'English cocker spaniel', 'british_shorthair': 'British Shorthair'},
  'flowers102': {'canterbury bells': 'Canterbury bells', 'english marigold': 'English marigold'},
}


def clean(data: str, own: list[str]) -> list[str]:
  """The names to ask for, in the order of the labels.

  Raises:
    UserError: if the table has another number of names than the set.
  """
  if data in WHOLE:
    names = WHOLE[data].split(', ')
    if len(names) != len(own):
      raise UserError(f'{data} has {len(own)} classes; the table of cleaned names has {len(names)}')
    return names
  table = PARTS.get(data, {})
  return [table.get(name) or _plain(name) for name in own]


def _plain(name: str) -> str:
  """"/a/airplane_cabin" (SUN397) becomes "airplane cabin"; the kind of a place, "/c/church/indoor", comes first."""
  name = re.sub(r'^/\w/', '', name)
  place, _, kind = name.partition('/') if name.count('/') == 1 and name != 'T-shirt/top' else (name, '', '')
  return f'{kind} {place}'.strip().replace('_', ' ')
