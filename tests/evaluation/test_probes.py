"""Probes, calibration and accuracies against scikit-learn and brute force."""
import numpy as np
import pytest
from sklearn import linear_model, metrics, neighbors

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import calibration, probes
from lightclip_jax.evaluation.tasks import few_shot
from lightclip_jax.evaluation.zero_shot import zero_shot


def clusters(rng, count, classes=5, dim=12, spread=0.9):
  centres = np.random.default_rng(7).normal(size=(classes, dim))
  labels = rng.integers(0, classes, count)
  x = centres[labels] + spread * rng.normal(size=(count, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.fixture(scope='module')
def data():
  rng = np.random.default_rng(0)
  return clusters(rng, 407), clusters(rng, 500)


@pytest.mark.parametrize('strength', [0.1, 10.0, 1000.0])
def test_logistic_regression_is_scikit_learns(data, strength):
  (x, y), (test, labels) = data
  found = probes.logistic_regression(x, y, 5, strength)
  reference = linear_model.LogisticRegression(C=strength, tol=1e-9, max_iter=5000).fit(x.astype(float), y)
  centred = found[:-1] - found[:-1].mean(axis=1, keepdims=True)   # the softmax does not see a common shift
  np.testing.assert_allclose(centred.T, reference.coef_, atol=5e-3 * np.abs(reference.coef_).max())
  ours = np.argmax(probes.scores(found, test), axis=1)
  assert abs(np.mean(ours == labels) - reference.score(test, labels)) <= 0.002
  assert np.mean(ours == labels) > 0.6


def test_a_start_changes_the_way_and_not_the_end(data):
  x, y = data[0]
  far = probes.logistic_regression(x, y, 5, 1e4)
  np.testing.assert_allclose(probes.logistic_regression(x, y, 5, 1.0, start=far)[:-1],
                             probes.logistic_regression(x, y, 5, 1.0)[:-1], atol=5e-3)


def test_the_sweep_takes_the_best_on_validation_and_fits_all_images(data, monkeypatch):
  monkeypatch.setattr(probes, 'STRENGTHS', (0.01, 1.0, 100.0))
  (x, y), (other, labels) = data
  weights, strength = probes.sweep((x, y), (other, labels), 5)
  alone = {c: np.mean(np.argmax(probes.scores(probes.logistic_regression(x, y, 5, c), other), axis=1) == labels)
           for c in probes.STRENGTHS}
  assert alone[strength] >= max(alone.values()) - 0.002
  both = linear_model.LogisticRegression(C=strength, tol=1e-9, max_iter=5000).fit(np.r_[x, other], np.r_[y, labels])
  assert np.mean(np.argmax(probes.scores(weights, other), axis=1) == both.predict(other)) > 0.99


@pytest.mark.parametrize('count', [1, 7, 20, 5000])
def test_neighbours_are_scikit_learns(data, count):
  (x, y), (test, _) = data
  votes = probes.nearest_neighbours(test, x, y, 5, count=count)
  kept = min(count, len(x))
  reference = neighbors.KNeighborsClassifier(kept, metric='cosine', algorithm='brute', weights=lambda d: np.exp(-d / 0.07))
  expected = reference.fit(x.astype(float), y).predict_proba(test.astype(float))
  np.testing.assert_allclose(votes / votes.sum(axis=1, keepdims=True), expected, atol=1e-6)


def test_neighbours_that_tie_vote_all_and_a_tie_of_classes_is_a_miss():
  x, y = np.eye(2, dtype=np.float32)[[0, 0, 1]], np.array([0, 1, 1])
  votes = probes.nearest_neighbours(np.eye(2, dtype=np.float32), x, y, 3, count=1)
  np.testing.assert_allclose(votes, [[1, 1, 0], [0, 1, 0]])
  np.testing.assert_array_equal(probes.ranks_of(votes, np.array([0, 1])), [1, 0])
  np.testing.assert_array_equal(probes.hits(votes, np.array([0, 1]), np.eye(2)), [False, True])
  assert not probes.hits(votes, np.array([0, 1]), np.zeros((2, 2))).any()
  with pytest.raises(UserError, match='0 images'):
    probes.nearest_neighbours(x, x[:0], y[:0], 3)


def test_class_means_and_shots(data):
  x, y = data[0]
  means = probes.class_means(x, y, 6)
  for label in range(5):
    mean = x[y == label].astype(float).mean(axis=0)
    np.testing.assert_allclose(means[label], mean / np.linalg.norm(mean), atol=1e-6)
  assert not means[5].any()
  chosen = few_shot.choose(y, 7, seed=1)
  assert len(set(chosen)) == len(chosen) and (np.bincount(y[chosen]) == 7).all()
  assert not np.array_equal(chosen, few_shot.choose(y, 7, seed=2))
  assert sorted(few_shot.choose(y, 10_000, seed=1)) == list(range(len(y)))


def test_a_fifth_of_each_class_is_split_off():
  labels = np.repeat([0, 1, 2, 3, 4], [50, 10, 1, 2, 4])
  kept, off = probes.split_off(labels)
  assert sorted([*kept, *off]) == list(range(67))
  np.testing.assert_array_equal(np.bincount(labels[off]), [10, 2, 0, 1, 1])


@pytest.mark.parametrize('count', [1, 2, 3])
def test_few_images_a_class_choose_a_regularisation(count):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(30, 64)) / 8
  labels = np.repeat(np.arange(30), count)
  x = centres[labels] + rng.normal(size=(len(labels), 64)) / 40
  kept, off = probes.split_off(labels)
  weights, strength = probes.sweep((x[kept], labels[kept]), (x[off], labels[off]), 30)
  assert strength == 1 if count == 1 else len(off) == 30
  assert np.mean(probes.scores(weights, x).argmax(axis=1) == labels) > 0.9


def test_accuracies_are_scikit_learns(data):
  x, y = data[1]
  classes = np.random.default_rng(5).normal(size=(5, 12))
  classes = (classes / np.linalg.norm(classes, axis=1, keepdims=True)).astype(np.float32)
  scores = x.astype(float) @ classes.astype(float).T
  got = zero_shot(x, classes, y, top=(1, 3))
  for k in (1, 3):
    assert got.top[k] == pytest.approx(metrics.top_k_accuracy_score(y, scores, k=k), abs=1e-12)
  assert got.mean_per_class == pytest.approx(metrics.balanced_accuracy_score(y, scores.argmax(axis=1)), abs=1e-12)


def test_calibration():
  rng = np.random.default_rng(0)
  confidence = rng.uniform(0, 1, 4000)
  confidence[:3] = 0.0, 0.5, 1.0     # on the edges
  right = rng.uniform(size=4000) < confidence
  assert calibration.error(confidence, right) < 0.03                       # it is as often right as it says
  assert calibration.error(confidence, np.zeros(4000, bool)) == pytest.approx(confidence.mean())
  bins = calibration.bins(confidence, right)
  assert sum(b.count for b in bins) == 4000 and len(bins) == 10
  for i, one in enumerate(bins):
    mine = (confidence >= i / 10) & ((confidence < (i + 1) / 10) | (i == 9))
    assert one.count == mine.sum() and one.accuracy == pytest.approx(right[mine].mean())


def test_confidence_is_the_softmax_of_scaled_cosines(data):
  (x, y), classes = data[1], np.eye(12, dtype=np.float32)[:5]
  confidence, right = calibration.confidence(x, classes, y, 10.0)
  logits = 10.0 * x[:, :5].astype(float)
  softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(confidence, softmax.max(axis=1), atol=1e-6)
  np.testing.assert_array_equal(right, softmax.argmax(axis=1) == y)
