"""Ranks, zero-shot and retrieval against brute force."""
import itertools
import math

import numpy as np
import pytest
import scipy.sparse

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import prompts
from lightclip_jax.evaluation.ranks import best_ranks, same
from lightclip_jax.evaluation.retrieval import distinct, retrieval
from lightclip_jax.evaluation.zero_shot import zero_shot
from lightclip_jax.inference.class_names import class_embeddings


def unit(rng, *shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_ranks(queries, candidates, right):
  """One query at a time: sort by score, wrong answers first among equals, and look for the first right one (none: the last)."""
  ranks = []
  for query, right_C in zip(queries.astype(float), right, strict=True):
    scored = [(-round(float(query @ candidate), 10), bool(one))
              for candidate, one in zip(candidates.astype(float), right_C, strict=True)]
    ranks.append([*(one for _, one in sorted(scored)), True].index(True))
  return np.array(ranks)


@pytest.mark.parametrize('chunk', [1, 7, 64, 1000])
def test_ranks_equal_brute_force_with_ties_and_many_right_answers(chunk):
  rng = np.random.default_rng(0)
  queries, candidates = unit(rng, 61, 4), unit(rng, 23, 4)[rng.integers(0, 23, 90)]   # candidates repeat: exact ties
  query_ids, candidate_ids = rng.integers(0, 12, 61), np.r_[np.arange(12), rng.integers(0, 12, 78)]
  equal = query_ids[:, None] == candidate_ids[None, :]
  np.testing.assert_array_equal(same(query_ids, candidate_ids).toarray(), equal)
  any_relation = rng.random((61, 90)) < 0.03
  any_relation[np.arange(61), rng.integers(0, 90, 61)] = True
  any_relation[5] = False
  for right in (equal, any_relation):
    got = best_ranks(queries, candidates, scipy.sparse.csr_array(right), chunk=chunk)
    np.testing.assert_array_equal(got, brute_ranks(queries, candidates, right))
    assert got.dtype == np.int64


def test_a_collapsed_model_is_never_right():
  equal = np.ones((20, 8), np.float32) / np.float32(math.sqrt(8))
  result = zero_shot(equal, equal, np.arange(20), top=(1, 5, 20))
  assert result.top == {1: 0.0, 5: 0.0, 20: 1.0}
  both = retrieval(equal, equal, same(np.arange(20), np.arange(20)))
  assert both.image_to_text.recall[10] == both.text_to_image.recall[10] == 0.0
  assert both.image_to_text.median_rank == 20


def test_ties_do_not_depend_on_the_scale_of_rounding():
  rng = np.random.default_rng(1)
  queries, repeated = unit(rng, 300, 512), np.repeat(unit(rng, 1, 512), 33, axis=0)
  for chunk in (1, 31, 300):
    assert (best_ranks(queries, repeated, same(np.zeros(300, int), np.arange(33)), chunk=chunk) == 32).all()


def test_zero_shot_equals_argsort_without_ties():
  rng = np.random.default_rng(2)
  images, classes, labels = unit(rng, 203, 16), unit(rng, 31, 16), rng.integers(0, 30, 203)   # class 30 has no image
  order = np.argsort(-(images @ classes.T), axis=1)
  result = zero_shot(images, classes, labels, top=(1, 5, 31), chunk=50)
  assert result.top[1] == pytest.approx(np.mean(order[:, 0] == labels), abs=1e-12)
  assert result.top[5] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)), abs=1e-12)
  assert result.top[31] == 1.0 and result.count == 203
  per_class = [np.mean(order[labels == c, 0] == c) for c in range(30)]
  assert result.mean_per_class == pytest.approx(np.mean(per_class), abs=1e-12)


def test_records_that_cannot_be_used_are_mistakes():
  eye = np.eye(3, dtype=np.float32)
  got = zero_shot(eye, eye, np.array([0, -1, 2]), top=(1, 3, 5))   # 5: also among more than there are classes
  assert got.top == {1: 2 / 3, 3: 2 / 3, 5: 2 / 3} and got.mean_per_class == 1.0 and got.ranks.tolist() == [0, 3, 0]
  assert zero_shot(eye, eye, np.array([-1, -1, -1]), top=(1,)).mean_per_class == 0.0
  texts, right = distinct([['a'], [''], ['b']])
  found = retrieval(eye, eye, right, top=(1, 3, 10))
  assert texts == ['a', '', 'b']
  for way in (found.image_to_text, found.text_to_image):
    assert way.recall == {1: 2 / 3, 3: 2 / 3, 10: 2 / 3} and way.count == 3 and way.chance[1] == pytest.approx(2 / 9)


def test_five_captions_an_image():
  rng = np.random.default_rng(3)
  images, texts = unit(rng, 40, 8), unit(rng, 200, 8)
  owner = np.repeat(np.arange(40), 5)
  scores = images.astype(float) @ texts.astype(float).T
  got = retrieval(images, texts, same(np.arange(40), owner), chunk=9)
  for k in (1, 5, 10):
    top_texts = np.argsort(-scores, axis=1)[:, :k]
    assert got.image_to_text.recall[k] == pytest.approx(np.mean((owner[top_texts] == np.arange(40)[:, None]).any(1)))
    top_images = np.argsort(-scores.T, axis=1)[:, :k]
    assert got.text_to_image.recall[k] == pytest.approx(np.mean((top_images == owner[:, None]).any(1)))
  assert (got.image_to_text.count, got.text_to_image.count) == (40, 200)
  assert got.text_to_image.chance == pytest.approx({1: 1 / 40, 5: 5 / 40, 10: 10 / 40})


def test_several_images_a_caption_count_once_as_a_query_and_any_of_them_is_right():
  texts = np.eye(3, dtype=np.float32)
  images = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)   # the second drawing of 0 looks like 1
  got = retrieval(images, texts, same(np.array([0, 0, 1, 2]), np.arange(3)), top=(1, 2))
  assert got.image_to_text.recall == {1: 0.75, 2: 0.75}      # wrong, then tied with a wrong one
  assert got.text_to_image.recall == {1: 2 / 3, 2: 1.0}      # text 1 ties with the wrong drawing
  assert got.text_to_image.count == 3


def test_a_caption_that_two_images_share_is_right_for_both():
  captions = [['a dog', 'it runs'], ['a dog', 'it sleeps', 'it sleeps'], ['a cat', 'it eats'], ['a cat', 'it sits']]
  texts, right = distinct(captions)
  assert texts == ['a dog', 'it runs', 'it sleeps', 'a cat', 'it eats', 'it sits']
  images = np.repeat(np.eye(2, 6, dtype=np.float32), 2, axis=0)   # each is what both of its kind say
  perfect = np.eye(2, 6, dtype=np.float32)[[0, 0, 0, 1, 1, 1]] + np.eye(6, dtype=np.float32)[[0, 2, 3, 1, 4, 5]] / 2
  got = retrieval(images, perfect, right, top=(1,))
  assert got.image_to_text.recall == {1: 1.0} and (got.image_to_text.count, got.text_to_image.count) == (4, 6)
  assert got.image_to_text.chance[1] == pytest.approx(2 / 6)
  assert got.text_to_image.chance[1] == pytest.approx((2 * 2 / 4 + 4 * 1 / 4) / 6)


@pytest.mark.parametrize('words', [4, 12, 40])
def test_retrieval_over_any_captions_equals_brute_force(words):
  rng = np.random.default_rng(words)
  captions = [[f'word {n}' for n in rng.integers(0, words, rng.integers(1, 5))] for _ in range(30)]
  texts, right = distinct(captions)
  dense = np.array([[text in of_image for text in texts] for of_image in captions])
  assert len(set(texts)) == len(texts) and (right.toarray() == dense).all()
  images, embedded = unit(rng, 30, 3), unit(rng, len(texts), 3)
  got = retrieval(images, embedded, right, top=(1, 3), chunk=7)
  for way, ranks, relation in ((got.image_to_text, brute_ranks(images, embedded, dense), dense),
                               (got.text_to_image, brute_ranks(embedded, images, dense.T), dense.T)):
    count, candidates = relation.shape
    assert way.count == count and way.median_rank == np.median(ranks) + 1
    for k in (1, 3):
      assert way.recall[k] == np.mean(ranks < k)
      subsets = list(itertools.combinations(range(candidates), min(k, candidates)))
      tries = [any(row[list(drawn)]) for row in relation for drawn in subsets]
      assert way.chance[k] == pytest.approx(np.mean(tries))


def test_chance_is_what_random_embeddings_reach():
  rng = np.random.default_rng(4)
  ids = rng.integers(0, 6, 30)
  ids[:6] = np.arange(6)
  runs = [retrieval(unit(rng, 30, 64), unit(rng, 6, 64), same(ids, np.arange(6)), top=(1, 3)) for _ in range(300)]
  for way in ('image_to_text', 'text_to_image'):
    for k in (1, 3):
      mean = np.mean([getattr(r, way).recall[k] for r in runs])
      assert mean == pytest.approx(getattr(runs[0], way).chance[k], abs=0.03)


def test_class_embeddings_are_normalised_means_of_templates():
  vectors = {'a cat.': [1, 0], 'cat': [0, 1], 'a dog.': [0, 1], 'dog': [0, 1]}
  embed = lambda texts: np.array([vectors[t] for t in texts], np.float32)   # noqa: E731
  got = class_embeddings(embed, ['cat', 'dog'], ['a {}.', '{}'])
  np.testing.assert_allclose(got, [[math.sqrt(0.5), math.sqrt(0.5)], [0, 1]], atol=1e-6)


@pytest.mark.parametrize('call, words', [
  (lambda e: zero_shot(e, e, np.array([0, 1, 7])), 'label 7.*3 classes'),
  (lambda e: zero_shot(e[:0], e, np.array([], int)), '0 images'),
  (lambda e: zero_shot(e * np.nan, e, np.arange(3)), 'query 0 is not finite'),
  (lambda e: retrieval(e, e[:0], same(np.arange(3), np.arange(0))), '0 texts'),
  (lambda e: class_embeddings(lambda t: e, ['a', ' ', 'b'], ['{}']), 'class 1 has no name'),
  (lambda e: class_embeddings(lambda t: e, ['a'], ['a photo']), "'a photo' must hold {} once"),
  (lambda e: prompts.templates('nmae'), "unknown prompt set 'nmae'; there are digit, name, photo"),
])
def test_errors_are_one_line_and_name_the_value(call, words):
  with pytest.raises(UserError, match=words) as caught:
    call(np.eye(3, dtype=np.float32))
  assert '\n' not in str(caught.value)


def test_template_sets_are_well_formed():
  for name in prompts.TEMPLATES:
    assert all(t.count('{}') == 1 for t in prompts.templates(name))
