"""Tokenizers of other houses: Hugging Face's `tokenizer.json` and CLIP's byte pairs.

Letters: W text positions.
"""
import gzip
import json
import os
import pathlib
import pickle
import subprocess
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightclip_jax.data import masking, tokenizers
from lightclip_jax.errors import UserError

TEXTS = ['a photo of a cat', 'Don’t &amp;amp; 12 DOGS!', '犬と猫 😀', 'naïve  café\n', '']
TORCH = os.environ.get('LIGHTCLIP_TORCH_PYTHON')


def _hugging_face(special):
  """`special`: unknown, pad, start and end, and perhaps mask."""
  from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
  made = Tokenizer(models.BPE(unk_token=special[0]))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False))
  start, end = special[2:4]
  made.post_processor = processors.TemplateProcessing(single=f'{start} $A {end}', special_tokens=[(start, 2), (end, 3)])
  made.enable_truncation(4)      # what its file says about length is not ours
  made.enable_padding(length=9)
  return tokenizers.HuggingFaceTokenizer(made.to_str().encode())


def _clip():
  """CLIP's format with a small vocabulary of merges."""
  pytest.importorskip('ftfy')
  merges = ['c a', 'ca t</w>', 'p h', 'o t', 'ph ot', 'phot o</w>', 'o f</w>']
  return tokenizers.ClipTokenizer(gzip.compress('\n'.join(['#version', *merges]).encode(), mtime=0))


@pytest.fixture(scope='module', params=['bert', 'no mask', 'clip'])
def tokenizer(request):
  if request.param == 'clip':
    return _clip()
  bert = ['[UNK]', '[PAD]', '[CLS]', '[SEP]', '[MASK]']
  return _hugging_face(bert if request.param == 'bert' else ['<unk>', '<pad>', '<s>', '</s>'])


def test_layout(tokenizer):
  tokens = tokenizer.encode(TEXTS, 40)
  assert tokens.dtype == np.int32 and tokens.shape == (5, 40) and tokens.max() < tokenizer.vocab_size
  for row, mask in zip(tokens, tokenizer.word_mask(tokens), strict=True):
    end = int(np.flatnonzero(row == tokenizer.end_id)[0])
    assert row[0] == tokenizer.start_id and (row[end + 1:] == tokenizer.pad_id).all()
    np.testing.assert_array_equal(mask, (np.arange(40) > 0) & (np.arange(40) < end))
  short = tokenizer.encode(TEXTS, 6)[0]
  assert short[-1] == tokenizer.end_id and (short[:-1] == tokens[0, :5]).all()
  assert tokenizer.decode(tokens[0]).replace(' ', '') == 'aphotoofacat'
  assert tokenizer.mask_id not in tokens and 0 <= tokenizer.mask_id < tokenizer.vocab_size


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.sampled_from(
    ['[MASK]', '[SEP] x', '</s>', '<start_of_text>', '<end_of_text> [CLS]', '<pad>', '! ! !'])), seed=st.integers(0, 9))
def test_no_text_becomes_a_special_token_and_masking_keeps_out(tokenizer, text, seed):
  row = tokenizer.encode([text], 64)[0]
  words = tokenizer.word_mask(row)
  assert not np.isin(row[words], tokenizer.special_ids).any() and not words[np.flatnonzero(row == tokenizer.end_id)[0]:].any()
  masked, positions, _, weights = masking.mask_words(
      row, words, np.random.default_rng(seed), fraction=0.5, max_masked=8, mask_id=tokenizer.mask_id,
      vocab_size=tokenizer.vocab_size, special_ids=tokenizer.special_ids)
  assert words[positions[weights > 0]].all()
  changed = masked[masked != row]
  assert not np.isin(changed, [i for i in tokenizer.special_ids if i != tokenizer.mask_id]).any()


def test_a_text_that_is_not_utf8_is_one_line(tokenizer):
  with pytest.raises(UserError, match=r"the text 'a \\udcff' is not UTF-8"):   # as a terminal gives bytes that are none
    tokenizer.encode(['a \udcff'], 8)


def test_travels(tokenizer, tmp_path):
  file = tmp_path / f'tokenizer{tokenizer.suffix}'
  file.write_bytes(tokenizer.to_bytes())
  for other in (tokenizers.load(file), tokenizers.from_bytes(tokenizer.to_bytes(), tokenizer.suffix),
                pickle.loads(pickle.dumps(tokenizer))):
    np.testing.assert_array_equal(other.encode(TEXTS, 20), tokenizer.encode(TEXTS, 20))
  assert len(tokenizer.pieces(tokenizer.encode(TEXTS[:1], 9)[0])) == 9


def test_clip_merges_cleans_and_pads_as_clip():
  tokenizer = _clip()
  letters = tokenizers._byte_letters()
  assert len(set(letters)) == 256 and letters[0] == '!'
  merged = {piece: 512 + i for i, piece in enumerate(['ca', 'cat</w>', 'ph', 'ot', 'phot', 'photo</w>', 'of</w>'])}
  one = {letter: 256 + letters.index(letter) for letter in 'a!'}
  row = tokenizer.encode(['A  photo\tof &amp;amp; cat!'], 12)[0]
  ampersand = 256 + letters.index('&')
  assert row.tolist() == [519, one['a'], merged['photo</w>'], merged['of</w>'], ampersand, merged['cat</w>'], one['!'], 520,
                          0, 0, 0, 0]
  assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.special_ids) == (522, 521, (519, 520, 521))


@pytest.mark.parametrize(('suffix', 'data', 'said'), [
    ('.json', b'{}', 'not a Hugging Face'), ('.json', b'\xff', 'not a Hugging Face'), ('.gz', b'nonsense', 'byte pairs'),
    ('.gz', gzip.compress(b'#\na b c\n', mtime=0), 'byte pairs')])
def test_bad_files_are_one_line(suffix, data, said):
  if suffix == '.gz':
    pytest.importorskip('ftfy')
  with pytest.raises(UserError, match=said) as error:
    tokenizers.from_bytes(data, suffix)
  assert '\n' not in str(error.value)


def captions(count):
  """Captions of all kinds: words, emoji, HTML, CJK, ligatures, quotes, broken encodings."""
  random = np.random.default_rng(0)
  words = ("a photo of the house café naïve 犬 猫が好き 中文字幕 한국어 привет 👍 👨‍👩‍👧 ❤️ 🇩🇪 "
           "&amp; &lt;b&gt; &amp;amp; don't I'm we've "
           '12345 3.14 x² ½ ﬁne “quoted” ‘single’ — … ©2020 schÃ¶n Ⅳ ＦＵＬＬ नमस्ते ไทย مرحبا שלום '
           'İstanbul ß STRASSE #tag @user '
           "http://a.b/c?d=e&f=g 100% $5 'Sup").split()
  ranges = [(0x21, 0x17f), (0x370, 0x3ff), (0x400, 0x4ff), (0x900, 0x97f), (0x2000, 0x206f), (0x2190, 0x21ff), (0x2600, 0x27bf),
            (0x3040, 0x30ff), (0x4e00, 0x4f00), (0xac00, 0xad00), (0x1f300, 0x1f64f), (0x1f900, 0x1f9ff)]
  letters = [chr(code) for low, high in ranges for code in range(low, high)]

  def word():
    return str(random.choice(words)) if random.random() < 0.8 else ''.join(random.choice(letters, random.integers(1, 5)))

  return [str(random.choice([' ', '  ', ' ', '\t'])).join(word() for _ in range(random.integers(0, 26))) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason='needs LIGHTCLIP_TORCH_PYTHON (launch/parity_env.sh makes it)')
def test_clip_ids_are_open_clips(tmp_path):
  pytest.importorskip('ftfy')
  texts = captions(10_000)
  (tmp_path / 'texts.json').write_text(json.dumps(texts))
  side = pathlib.Path(__file__).parents[1] / 'models'
  program = textwrap.dedent(f'''
    import json, sys, numpy
    sys.path.insert(0, {str(side)!r})
    import torch_side, open_clip.tokenizer
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    numpy.save(sys.argv[2], tokenizer(json.load(open(sys.argv[1])), 77).numpy())
    print(open_clip.tokenizer.default_bpe())
  ''')
  done = subprocess.run([TORCH, '-c', program, tmp_path / 'texts.json', tmp_path / 'ids.npy'], capture_output=True, text=True,
                        check=True)
  tokenizer = tokenizers.load(done.stdout.strip())
  np.testing.assert_array_equal(tokenizer.encode(texts, 77), np.load(tmp_path / 'ids.npy'))
