"""Tasks, gallery and matchings on a small prepared folder, with models whose answers are known."""
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightclip_jax import config
from lightclip_jax.data import pipeline, transforms, writer
from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import evaluate, gallery, insight, matching, metrics, results, tasks
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.image_sets import heldout
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import pointing, prepared

SPLITS = ('heldout_images', 'heldout_style', 'heldout_concepts')
MODEL = config.replace(config.Model(), image=dict(size=16), text=dict(context=32))
MORE = ('pointing', 'knn:groups', 'few_shot:digits')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('shapes') / 'shapes'
  shapes.prepare(path, size=24)
  return path


class Oracle:
  """Embeds an image as the text that `answer` gives for its record; each text has an axis of its own."""
  image_size, batch_size, context, logit_scale, share, shares = 16, 32, 8, 10.0, 0, 1

  def __init__(self, folder, answer):
    self.axes, self.answer, self.tokenizer = {}, answer, pipeline.load_tokenizer(folder)
    self.by_split = {split: pipeline.evaluation_records(folder, split) for split in SPLITS}
    self.asked = []

  def texts(self, texts):
    self.asked += texts
    return np.eye(200, dtype=np.float32)[[self.axes.setdefault(text, len(self.axes)) for text in texts]]

  def images(self, batches):
    count = sum((batch['index'] >= 0).sum() for batch in batches)
    records = next(records for records in self.by_split.values() if len(records) == count)
    return np.eye(200, dtype=np.float32)[[self.axes.setdefault(self.answer(r), len(self.axes)) for r in records]]

  def tokens(self, images, tokens):
    rng = np.random.default_rng(0)
    patches, words = rng.normal(size=(len(images), 16, 4)), rng.normal(size=(*tokens.shape, 4))
    return tuple((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32) for x in (patches, words))


def test_splits_differ_in_size(folder):
  counts = [len(records) for records in Oracle(folder, None).by_split.values()]
  assert len(set(counts)) == 3   # what the oracle above tells them apart by


def test_an_oracle_of_names_is_always_right_and_texts_are_embedded_once(folder):
  oracle = Oracle(folder, lambda record: record.concept)
  got = {m.name: m for m in evaluate.evaluate_all(oracle, folder, SPLITS)}
  for split in SPLITS:
    assert got[f'eval/{split}/concept_top1'].value == got[f'eval/{split}/text_to_image_r1'].value == 1.0
    assert got[f'eval/{split}/concept_top1'].chance == pytest.approx(1 / 36)
    assert got[f'eval/{split}/image_to_text_median_rank'].value == 1.0
    assert got[f'eval/{split}/group_top1'].value == 0.0          # a name is no group: all groups tie at zero
  style = oracle.by_split['heldout_style']
  assert got['eval/heldout_style/concept_top1'].count == len(style) == 108
  assert got['eval/heldout_style/text_to_image_r1'].count == 36            # each name once, three drawings each
  assert len(oracle.asked) == len(set(oracle.asked)) == 36 + 6


def test_an_oracle_of_groups_and_one_that_is_right_for_one_colour(folder):
  groups = Oracle(folder, lambda record: record.group)
  got = metrics.scalars(evaluate.evaluate_all(groups, folder, ['heldout_style']))
  assert got['eval/heldout_style/group_top1'] == 1.0 and got['eval/heldout_style/concept_top1'] == 0.0
  red = Oracle(folder, lambda record: record.concept if record.concept.startswith('red') else 'green bar')
  got = metrics.scalars(evaluate.evaluate_all(red, folder, ['heldout_style']))
  assert got['eval/heldout_style/concept_top1'] == pytest.approx(7 / 36)   # six red ones, and the green bar itself


def test_captions_of_pairs_without_concepts(folder):
  """All captions of an image are right for it when the data have no names."""
  session = Session(Oracle(folder, lambda record: record.captions[3]), folder)
  session.manifest = types.SimpleNamespace(name='pairs', concepts=(), groups=())
  pairs = [dataclasses.replace(r, concept='', group='') for r in session.records('heldout_images')]
  session.records = lambda split: pairs
  got = {m.name.split('/')[-1]: m for m in prepared.run(session, 'heldout_images')}
  assert not [name for name in got if 'top' in name]
  assert got['image_to_text_r1'].value == 1.0
  texts = sum(len(r.captions) for r in session.records('heldout_images'))
  assert got['text_to_image_r1'].count == texts
  assert got['text_to_image_r1'].value == pytest.approx(len(session.records('heldout_images')) / texts)


def test_a_mixtures_pairs_without_concepts_are_not_asked_for_one(folder):
  records = pipeline.evaluation_records(folder, 'heldout_images')
  for i in (1, 2, 5):
    records[i] = dataclasses.replace(records[i], concept='', group='', captions=('a sentence', f'sentence {i}'))
  records[7] = dataclasses.replace(records[7], concept='', group='', captions=('',))   # cannot be used
  oracle = Oracle(folder, lambda record: record.concept or record.captions[-1])
  oracle.by_split = {'heldout_images': records}
  session = Session(oracle, folder)
  session.records = lambda split: records
  got = {m.name: m for m in prepared.run(session, 'heldout_images')}
  asked = len(records) - 3
  assert (got['concept_top1'].value, got['concept_top1'].count) == (pytest.approx((asked - 1) / asked), asked)
  assert got['group_top1'].count == asked
  assert got['image_to_text_r1'].value == pytest.approx((len(records) - 1) / len(records))   # by their second captions
  assert {p.name for p in gallery.make_gallery(session, 'heldout_images', count=99) if not p.right} == {''}   # the black one
  assert sum(one.count for one in insight.look(session, 'heldout_images', []).bins) == asked
  session, oracle.by_split = Session(oracle, folder), {'heldout_images': records[1:3]}
  session.records = lambda split: records[1:3]
  assert [m.name for m in prepared.run(session, 'heldout_images') if 'top' in m.name] == []
  assert not gallery.make_gallery(session, 'heldout_images')
  assert insight.look(session, 'heldout_images', []) == insight.Insight()


def test_a_caption_that_two_images_share_is_no_miss_for_either():
  captions = [('a dog', 'it runs'), ('a dog', 'it sleeps'), ('a cat', 'it eats'), ('a cat', 'it sits')]
  vectors = {text: np.eye(2, dtype=np.float32)[i // 2] for i, of_image in enumerate(captions) for text in of_image}
  vectors |= {text: vectors[text] * 2 for text in ('a dog', 'a cat')}   # the nearest to all of their images
  session = types.SimpleNamespace(images=lambda split: np.repeat(np.eye(2, dtype=np.float32), 2, axis=0),
                                  texts=lambda texts: np.stack([vectors[text] for text in texts]))
  got = {m.name: m for m in prepared._retrieval(session, session.images('any'), captions)}
  assert got['image_to_text_r1'].value == 1.0 and got['text_to_image_r1'].count == 6


def test_a_tables_rows_of_one_image_are_one_image(folder):
  """A row for each caption, as COCO's: the others were wrong answers that tie with the right one, so nothing was found."""
  pairs = [dataclasses.replace(r, concept='', group='') for r in pipeline.evaluation_records(folder, 'heldout_images')]
  rows = [dataclasses.replace(r, captions=(f'{r.key} {number}',)) for r in pairs for number in range(3)]
  rows += [dataclasses.replace(pairs[0], image=transforms.BLACK, captions=('',))] * 2   # cannot be used
  oracle = Oracle(folder, lambda record: record.captions[0] and record.key)
  by_text, oracle.by_split = oracle.texts, {'heldout_images': rows}
  oracle.texts = lambda texts: by_text([text.rpartition(' ')[0] for text in texts])
  session = Session(oracle, folder)
  session.manifest, session.records = types.SimpleNamespace(name='pairs', concepts=(), groups=()), lambda split: rows
  got = {m.name: (m.value, m.count) for m in prepared.run(session, 'heldout_images')}
  images, texts = len(pairs), 3 * len(pairs)
  assert got['image_to_text_r1'] == (pytest.approx(images / (images + 2)), images + 2)
  assert got['text_to_image_r1'] == (pytest.approx(texts / (texts + 1)), texts + 1)   # and the empty one


def test_records_that_cannot_be_used_count_as_mistakes(tmp_path, capfd):
  shapes.prepare(folder := tmp_path / 'shapes', size=24)
  records = pipeline.evaluation_records(folder, 'heldout_images')
  records[4] = dataclasses.replace(records[4], captions=(' ',))
  records[7] = dataclasses.replace(records[7], image=records[7].image[:30])
  writer._write_split(folder, 'heldout_images', records, [])
  oracle = Oracle(folder, lambda record: record.concept)   # its answer to a black image is the empty text
  session = Session(oracle, folder)
  got = {m.name.split('/')[-1]: m for m in evaluate.run(session, evaluate.of_splits(['heldout_images']))}
  assert 'as a mistake' in capfd.readouterr().err
  count = len(oracle.by_split['heldout_images'])
  for name in ('concept_top1', 'concept_top5', 'image_to_text_r1', 'image_to_text_r10'):
    assert (got[name].value, got[name].count) == (pytest.approx((count - 2) / count), count)
  texts = got['text_to_image_r1'].count
  assert got['text_to_image_r1'].value == pytest.approx((texts - 1) / texts)   # the empty text is asked once
  assert sum(not p.right for p in gallery.make_gallery(session, 'heldout_images', count=count)) == 2
  looked = insight.look(session, 'heldout_images', ['heldout_style'])
  assert sum(one.count for one in looked.confused) == count - 2 and sum(one.count for one in looked.bins) == count
  assert '' not in heldout.load(session, 'concept').classes


class Colours(nn.Module):
  """A model on real batches: mean colours, and sums of token ids."""

  def setup(self):
    self.scale = self.param('scale', nn.initializers.ones, ())

  def encode_image(self, images):
    return self.scale * images.astype(jnp.float32).mean(axis=(1, 2)) / 255

  def encode_tokens(self, images, tokens):
    """Four patches, and words that are colours of no meaning."""
    patches = images.astype(jnp.float32).reshape(len(images), 2, 8, 2, 8, 3).mean(axis=(2, 4)).reshape(len(images), 4, 3)
    words = jnp.stack([jnp.cos(k * tokens.astype(jnp.float32)) for k in (1, 2, 3)], axis=-1)
    return self.scale * patches / 255, words

  def encode_text(self, tokens):
    return self.scale * jnp.stack([jnp.cos(k * tokens.sum(axis=1).astype(jnp.float32)) for k in (1, 2, 3)], axis=-1)


def test_one_and_eight_devices_give_the_same_metrics(folder, monkeypatch):
  monkeypatch.setattr(pointing, 'SCENES', 30)
  found = []
  for devices, batch_size in ((1, 7), (8, 7), (8, 64)):
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()[:devices]), ('data',)), PartitionSpec('data'))
    variables = jax.device_put({'params': {'scale': 1.0}}, NamedSharding(sharding.mesh, PartitionSpec()))
    embedder = Embedder(Colours(), MODEL, variables, pipeline.load_tokenizer(folder), sharding=sharding,
                        batch_size=batch_size)
    found.append(evaluate.run(Session(embedder, folder), evaluate.of_splits(SPLITS) | tasks.choose(MORE)))
  assert found[0] == found[1] == found[2]
  assert len(found[0]) == 3 * 11 + 2 + 2 + 3


def test_gallery_mixes_right_and_wrong_and_is_deterministic(folder):
  answer = lambda record: record.concept if record.concept.startswith('red') else 'green bar'   # noqa: E731
  pictures, again = (gallery.make_gallery(Session(Oracle(folder, answer), folder), 'heldout_style', count=12)
                     for _ in range(2))
  assert [p.name for p in pictures] == [p.name for p in again]
  assert [p.right for p in pictures] == [True, False] * 6
  for picture in pictures:
    assert picture.image.shape == (96, 96, 3) and picture.image.dtype == np.uint8
    assert len(picture.guesses) == 5 and picture.style == 'small' and picture.licence == 'Apache-2.0'
    best = [p for _, p in picture.guesses]
    assert best == sorted(best, reverse=True) and sum(best) <= 1 + 1e-6
    assert best[0] == pytest.approx(np.exp(10) / (np.exp(10) + 35), rel=1e-5)


@pytest.mark.parametrize('right, count, expected', [(3, 10, 10), (0, 10, 10), (20, 10, 10), (2, 50, 20)])
def test_choose_takes_what_there_is(right, count, expected):
  chosen = gallery.choose([f'k{i}' for i in range(20)], np.arange(20) < right, count)
  assert len(chosen) == len(set(chosen)) == expected
  assert sum(i < right for i in chosen) == min(right, count // 2 if right < 20 else count)


def test_matchings_draw_each_word_on_a_square_grid(folder):
  drawn = matching.make_matchings(Session(Oracle(folder, lambda r: r.concept), folder), 'heldout_style', count=5)
  assert len(drawn) == 5
  for one in drawn:
    assert len(one.words) == len(one.heat) == 2 and one.image.shape == (128, 128, 3)
    assert one.words[0] in shapes.COLOURS and one.words[1] in shapes.SHAPES
    for heat in one.heat:
      assert heat.shape == (4, 4) and (heat >= 0).all()
  untrained = config.replace(config.TokenMatching(), weight=config.constant(0.0))   # whose heads are as they were drawn
  assert not matching.make_matchings(Session(Oracle(folder, None), folder, token_matching=untrained), 'heldout_style')


def test_plans_match_each_word_once():
  patches, words = np.eye(9, dtype=np.float32)[None], np.eye(9, dtype=np.float32)[None, [0, 4, 7, 2]]
  plan = matching.plans(patches, words, np.array([[False, True, True, False]]), 0.01, 50)[0]
  assert plan[:, [0, 3]].sum() == 0
  np.testing.assert_allclose(plan[[4, 7], [1, 2]], 1.0, atol=1e-3)


@pytest.mark.parametrize('pieces, words', [
  (['▁red', '▁app', 'le'], ['red', 'apple']),
  (['▁', 'red', '▁circle'], ['red', 'circle']),
  (['re', 'd</w>', 'apple</w>'], ['red', 'apple']),
  (['▁'], []), ([], []),
])
def test_pieces_join_to_words(pieces, words):
  assert [''.join(word.values()) for word in matching.join_pieces(pieces)] == words


def test_errors(folder, tmp_path):
  with pytest.raises(UserError, match="unknown task 'heldout_stile'; there are: heldout_images, heldout_style"):
    tasks.choose(['heldout_style', 'heldout_stile'])
  with pytest.raises(UserError, match="no split 'nothing'"):
    evaluate.evaluate_all(Oracle(folder, None), folder, ['nothing'])
  with pytest.raises(UserError, match='data folder'):
    evaluate.evaluate_all(Oracle(folder, None), tmp_path / 'missing', SPLITS)


def test_the_users_own_split_is_a_task_but_none_of_the_built_in_data():
  assert list(tasks.choose(['heldout'])) == ['heldout'] and 'heldout' not in tasks.choose(['all'])


def test_a_task_is_one_entry(folder, monkeypatch):
  monkeypatch.setitem(tasks.TASKS, 'mine', lambda session: [metrics.Metric(f'x_{session.manifest.name}', 0.5, 4, 0.25)])
  got = evaluate.run(Session(Oracle(folder, None), folder), tasks.choose(['mine']))
  assert metrics.scalars(got) == {'eval/mine/x_shapes': 0.5}


def test_json_holds_value_count_chance_and_interval(folder, tmp_path):
  found = evaluate.evaluate_all(Oracle(folder, lambda r: r.concept), folder, ['heldout_style'])
  results.write_json(tmp_path / 'new' / 'out.json', found, step=7)
  read = json.loads((tmp_path / 'new' / 'out.json').read_text())
  assert read['step'] == 7
  first = read['metrics'][0]
  assert first['name'] == 'eval/heldout_style/concept_top1' and first['count'] == 108 and first['value'] == 1.0
  assert first['interval_95'] == pytest.approx([1 / (1 + 1.959964 ** 2 / 108), 1.0])   # Wilson at 1: n / (n + z²)
