"""Tokenizer and masking.

Letters: W text positions, K masked positions.
"""
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightclip_jax.data import masking, tokenizers
from lightclip_jax.errors import UserError

CAPTIONS = ['red circle', 'a blue square on the left', 'Café, naïve & co', 'green triangle (shapes)', '犬 dog'] * 3


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(CAPTIONS, 120)


def test_special_ids(tokenizer):
  assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id) == (0, 2, 3, 4)
  assert set(tokenizer.special_ids) == {0, 2, 3, 4} and tokenizer.vocab_size <= 120
  assert tokenizer.pieces([4]) == ['[MASK]']


def test_layout_and_round_trip(tokenizer):
  tokens = tokenizer.encode(CAPTIONS, 40)
  assert tokens.shape == (len(CAPTIONS), 40) and tokens.dtype == np.int32
  for row, text in zip(tokens, CAPTIONS, strict=True):
    end = int(np.flatnonzero(row == 3)[0])
    assert row[0] == 2 and (row[end + 1:] == 0).all() and not np.isin(row[1:end], tokenizer.special_ids).any()
    assert tokenizer.decode(row) == text.lower()
  np.testing.assert_array_equal(tokenizer.encode(['RED Circle'], 9), tokenizer.encode(['red circle'], 9))


def test_truncation_keeps_the_end(tokenizer):
  long, short = tokenizer.encode([' '.join(CAPTIONS)], 64)[0], tokenizer.encode([' '.join(CAPTIONS)], 8)[0]
  assert short[-1] == 3 and (short[:-1] == long[:7]).all()


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.sampled_from(['[MASK]', '<s>', '</s>', '<pad>', '[MASK] [MASK]'])))
def test_no_text_becomes_a_special_token(tokenizer, text):
  row = tokenizer.encode([text], 50)[0]
  inside = row[1:int(np.flatnonzero(row == 3)[0])]
  assert not np.isin(inside, tokenizer.special_ids).any()
  np.testing.assert_array_equal(tokenizer.word_mask(row), ~np.isin(row, [0, 2, 3, 4]))


def test_a_text_that_is_not_utf8_is_one_line(tokenizer):
  with pytest.raises(UserError, match=r"the text 'a \\udcff' is not UTF-8"):   # as a terminal gives bytes that are none
    tokenizer.encode(['a \udcff'], 8)


def test_unknown_words_are_words(tokenizer):
  row = tokenizer.encode(['ж'], 6)[0]
  assert 1 in row and tokenizer.word_mask(row)[row == 1].all()


def test_travels_as_bytes_and_by_pickle(tokenizer, tmp_path):
  (tmp_path / 't.model').write_bytes(tokenizer.to_bytes())
  for other in (tokenizers.from_bytes(tokenizer.to_bytes()), pickle.loads(pickle.dumps(tokenizer)),
                tokenizers.load(tmp_path / 't.model')):
    np.testing.assert_array_equal(other.encode(CAPTIONS, 20), tokenizer.encode(CAPTIONS, 20))


def test_training_is_deterministic(tokenizer):
  assert tokenizers.train(CAPTIONS, 120).to_bytes() == tokenizer.to_bytes()


def test_bad_tokenizers(tmp_path):
  with pytest.raises(UserError, match='there is no tokenizer file'):
    tokenizers.load(tmp_path / 'x.model')
  (tmp_path / 'x.model').write_bytes(b'nonsense')
  with pytest.raises(UserError, match='not a SentencePiece model'):
    tokenizers.load(tmp_path / 'x.model')
  (tmp_path / 'x.bin').touch()
  with pytest.raises(UserError, match='known suffixes: .model'):
    tokenizers.load(tmp_path / 'x.bin')
  with pytest.raises(UserError, match='cannot train a tokenizer of 8 pieces'):
    tokenizers.train(CAPTIONS, 8)


SPECIAL = (0, 2, 3, 4)


def _mask(words, pads, seed, fraction=0.15, max_masked=12):
  tokens = np.array([2, *words, 3, *[0] * pads], np.int32)
  is_word = ~np.isin(tokens, SPECIAL)
  out = masking.mask_words(tokens, is_word, np.random.default_rng(seed), fraction=fraction, max_masked=max_masked,
                           mask_id=4, vocab_size=50, special_ids=SPECIAL)
  return tokens, is_word, *out


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.sampled_from([1, *range(5, 50)]), max_size=40), pads=st.integers(0, 5),
       seed=st.integers(0, 999), fraction=st.floats(0, 1), max_masked=st.integers(1, 20))
def test_masking_properties(words, pads, seed, fraction, max_masked):
  tokens, is_word, masked, positions, labels, weights = _mask(words, pads, seed, fraction, max_masked)
  count = int(weights.sum())
  assert (masked.dtype, positions.dtype, labels.dtype, weights.dtype) == (np.int32, np.int32, np.int32, np.float32)
  assert positions.shape == labels.shape == weights.shape == (max_masked,)
  assert set(weights[:count]) <= {1.0} and not weights[count:].any() and not positions[count:].any()
  assert (count >= 1) == bool(words) and count <= min(max_masked, len(words))
  assert count <= max(1, int(np.ceil(fraction * len(words))))
  chosen = positions[:count]
  assert len(set(chosen)) == count and is_word[chosen].all()
  np.testing.assert_array_equal(labels[:count], tokens[chosen])
  others = np.setdiff1d(np.arange(len(tokens)), chosen)
  np.testing.assert_array_equal(masked[others], tokens[others])
  assert not np.isin(masked[chosen], (0, 2, 3)).any()


def test_masking_rates():
  kinds = {'mask': 0, 'kept': 0, 'random': 0}
  drawn = set()
  total = 0
  for seed in range(4000):
    tokens, _, masked, positions, labels, weights = _mask([7] * 20, 2, seed)
    for position in positions[weights > 0]:
      token = int(masked[position])
      kinds['mask' if token == 4 else 'kept' if token == 7 else 'random'] += 1
      drawn.add(token)
      total += 1
  assert abs(total / 4000 - 3.0) < 0.03                        # 15 % of 20
  assert abs(kinds['mask'] / total - 0.8) < 0.015 and abs(kinds['random'] / total - 0.1 * 45 / 46) < 0.012
  assert drawn == {1, *range(4, 50)}                           # every ordinary word, and [MASK] itself
