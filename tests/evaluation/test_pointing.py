"""Scenes whose places are known, pointed at by models whose tokens are known."""
import numpy as np
import pytest

from lightclip_jax.data import pipeline
from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import scenes
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import pointing


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('pointing') / 'shapes'
  shapes.prepare(path, size=24)
  return path


@pytest.fixture(scope='module')
def records(folder):
  return pipeline.evaluation_records(folder, 'heldout_style')


@pytest.fixture(scope='module')
def tokenizer(folder):
  return pipeline.load_tokenizer(folder)


class Pointer:
  """Finds each word of colour by the colour that is most in a patch; `blind` sees the same in all patches."""
  batch_size, context, logit_scale = 64, 48, 10.0

  def __init__(self, tokenizer, grid, blind=False):
    self.tokenizer, self.grid, self.blind, self.image_size = tokenizer, grid, blind, 16 * grid

  def tokens(self, images, tokens):
    names = list(shapes.COLOURS)
    pieces = {i: self.tokenizer.pieces([i])[0].removeprefix('▁') for i in np.unique(tokens)}
    words = np.array([[[pieces[i] == name for name in names] for i in row] for row in tokens], np.float32)
    patches = images.reshape(len(images), self.grid, 16, self.grid, 16, 3).swapaxes(2, 3).reshape(len(images), -1, 256, 3)
    colours = np.array(list(shapes.COLOURS.values()), float)
    distance = np.abs(patches[:, :, :, None] - colours[None, None, None]).sum(axis=-1)
    found = (distance < 90).mean(axis=2)
    return np.zeros_like(found) if self.blind else found / found.max(axis=(1, 2), keepdims=True), words


@pytest.mark.parametrize('grid', [2, 7])
def test_a_model_that_knows_colours_points_right_and_a_blind_one_never(folder, tokenizer, grid, monkeypatch):
  monkeypatch.setattr(pointing, 'SCENES', 90)
  metrics = {m.name: m for m in pointing.run(Session(Pointer(tokenizer, grid), folder))}
  # A colour that a scene has twice is no name; every other must be found.
  found = scenes.compose(pipeline.evaluation_records(folder, 'heldout_style'), tokenizer, size=16, context=48, count=90)
  colours = [[name.split()[0] for name in scene.names] for scene in found]
  once = np.mean([of_scene.count(colour) == 1 for of_scene in colours for colour in of_scene])
  assert 0.6 < once <= metrics['max_similarity'].value and once <= metrics['plan'].value
  assert 1 / 4 < metrics['plan'].chance < 1 / 2
  blind = pointing.run(Session(Pointer(tokenizer, grid, blind=True), folder))
  assert [m.value for m in blind][1] == 0.0 and blind[0].value < 0.5


def test_a_scene_has_its_things_in_their_cells_and_words_at_their_places(records, tokenizer):
  found = scenes.compose(records, tokenizer, size=48, context=48, count=60)
  assert len(found) == 60 and {len(scene.names) for scene in found} == {2, 3, 4}
  for scene in found:
    assert scene.caption == ' and '.join(f'a {name}' for name in scene.names)   # no colour starts with a vowel
    assert len(set(scene.names)) == len(set(scene.cells)) == len(scene.cells)
    for name, places in zip(scene.names, scene.places, strict=True):
      assert tokenizer.decode(scene.tokens[list(places)]) == name
    used = {(row, column) for row in (0, 1) for column in (0, 1)
            if (scene.image[24 * row:24 * row + 24, 24 * column:24 * column + 24] < 200).any()}
    assert used == set(scene.cells)


def test_scenes_are_the_same_for_a_seed_and_others_for_another(records, tokenizer):
  def captions(seed):
    return [scene.caption for scene in scenes.compose(records, tokenizer, size=24, context=48, count=9, seed=seed)]
  assert captions(1) == captions(1) != captions(2)


def test_a_short_context_leaves_things_out_and_never_cuts_a_word(records, tokenizer):
  found = scenes.compose(records, tokenizer, size=24, context=25, count=30)
  assert found and max(len(scene.names) for scene in found) < 4
  for scene in found:
    assert tokenizer.decode(scene.tokens) == scene.caption
  assert not scenes.compose(records, tokenizer, size=24, context=4, count=30)


def test_captions():
  assert scenes.caption_of(['apple', 'dog face']) == ('an apple and a dog face', [[1], [4, 5]])


@pytest.mark.parametrize('cell, grid, expected', [
  ((0, 1), 2, [[0, 1], [0, 0]]),
  ((1, 0), 3, [[0, 0, 0], [1, 1, 0], [1, 1, 0]]),              # the middle row and column belong to both sides
  ((1, 1), 4, [[0] * 4, [0] * 4, [0, 0, 1, 1], [0, 0, 1, 1]]),
])
def test_inside(cell, grid, expected):
  np.testing.assert_array_equal(pointing.inside(cell, grid), np.array(expected, bool))


def test_a_patch_elsewhere_that_is_as_hot_makes_a_miss():
  scene = scenes.Scene(np.zeros((4, 4, 3), np.uint8), '', np.zeros(4, int), ('a', 'b'), ((0, 0), (1, 1)), ((1,), (2, 3)))
  maps = np.zeros((1, 4, 4))
  maps[0, 0, 1] = maps[0, 3, 2] = 1.0
  assert pointing.hits([scene], maps, 2).tolist() == [True, True]
  maps[0, 2, 1] = maps[0, 0, 2] = 1.0
  assert pointing.hits([scene], maps, 2).tolist() == [False, False]
  maps[0, 3, 3] = 0.5     # both of a name's pieces count
  assert pointing.hits([scene], maps, 2).tolist() == [False, True]


def test_errors(folder, tokenizer):
  short = Pointer(tokenizer, 2)
  short.context = 4
  with pytest.raises(UserError, match='fits into 4 text positions'):
    pointing.run(Session(short, folder))
  one = Pointer(tokenizer, 2)
  one.tokens = lambda images, tokens: (np.ones((len(images), 3, 2)), np.ones((*tokens.shape, 2)))
  with pytest.raises(UserError, match='3 tokens'):
    pointing.run(Session(one, folder))
