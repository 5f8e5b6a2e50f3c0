"""The page's JavaScript computes what Python does: token ids, pixels, matching plans, rankings."""
import base64
import gzip
import json
import random

import colour_export
import numpy as np
import page_in_node
import pytest

from lightclip_jax.data import tokenizers, transforms
from lightclip_jax.evaluation.matching import join_pieces
from lightclip_jax.search import ranking

LONG = ['', ' ', '   a   b  ', 'red ' * 5000, 'x' * 50000, '家族と犬' * 3000, '👩‍👩‍👧 family 👨🏽‍🚀', 'naïve café CAFÉ é',
        '▁▁ a', 'ＦＵＬＬ width ½ ﬁ', 'ΣΊΣΥΦΟΣ İstanbul ẞ', "it's what they've we'll", '1234 12a b2', 
        '\u0000\u0085\ufeff\u2028x', '🏴󠁧󠁢󠁥󠁮󠁧󠁿 \u202e abc', '<s> </s> [MASK] <pad>']
SCRIPTS = [(0x20, 0x7f)] * 4 + [(0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xa00), (0x1100, 0x1200),
                                (0x2000, 0x2500), (0x3000, 0x3400), (0x4e00, 0x9fff), (0xac00, 0xd7a4), (0xf900, 0xfffe),
                                (0x1d400, 0x1d800), (0x1f300, 0x1fa00), (0x20000, 0x20100)]


def texts(count):
  rng = random.Random(0)
  letters = lambda: ''.join(chr(rng.randrange(*rng.choice(SCRIPTS))) for _ in range(rng.randrange(1, 6)))  # noqa: E731
  words = ' '.join(colour_export.CAPTIONS).split()
  return LONG + [' '.join(rng.choice(words) if rng.random() < 0.6 else letters() for _ in range(rng.randrange(1, 12)))
                 for _ in range(count - len(LONG))]


def check_ids(file, context, captions):
  tokenizer = tokenizers.load(file)
  special = dict(pad=tokenizer.pad_id, start=tokenizer.start_id, end=tokenizer.end_id)
  got = page_in_node.call(tokens=dict(file=str(file), special=special, context=context, texts=captions))['tokens']
  expected = tokenizer.encode(captions, context)
  wrong = [(text[:60], a, b.tolist()) for text, a, b in zip(captions, got, expected, strict=True) if a != b.tolist()]
  assert not wrong, (len(wrong), wrong[:3])
  assert len(np.unique(expected)) > 900   # the texts reach many pieces


def test_sentencepiece_ids_are_pythons(tmp_path):
  captions = texts(5000)
  (tmp_path / 'tokenizer.model').write_bytes(tokenizers.train(captions[len(LONG):1000], 4000).to_bytes())
  check_ids(tmp_path / 'tokenizer.model', 40, captions)


def test_byte_pair_ids_are_pythons(tmp_path):
  """A tokenizer.json put together as CLIP's is, with a vocabulary learnt here."""
  hf = pytest.importorskip('tokenizers')
  split = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
  made = hf.Tokenizer(hf.models.BPE(unk_token='<|endoftext|>', end_of_word_suffix='</w>', fuse_unk=False))
  normal, splits = hf.normalizers, hf.pre_tokenizers
  made.normalizer = normal.Sequence([normal.NFC(), normal.Replace(hf.Regex(r'\s+'), ' '), normal.Lowercase()])
  made.pre_tokenizer = splits.Sequence([splits.Split(hf.Regex(split), 'removed', invert=True),
                                        splits.ByteLevel(add_prefix_space=False)])
  captions = texts(5000)
  letters = splits.ByteLevel.alphabet()
  trainer = hf.trainers.BpeTrainer(vocab_size=1200, special_tokens=['<|startoftext|>', '<|endoftext|>'], show_progress=False,
                                   initial_alphabet=letters, end_of_word_suffix='</w>')
  made.train_from_iterator(captions[len(LONG):1000], trainer)
  file = json.loads(made.to_str())
  for letter in [*letters]:   # CLIP's has every byte at the end of a word too
    file['model']['vocab'].setdefault(f'{letter}</w>', len(file['model']['vocab']))
  file['post_processor'] = {'type': 'RobertaProcessing', 'sep': ['<|endoftext|>', 1], 'cls': ['<|startoftext|>', 0],
                            'trim_offsets': False, 'add_prefix_space': False}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(file))
  check_ids(tmp_path / 'tokenizer.json', 77, [*captions, 'a <|endoftext|> b', '<|STARTOFTEXT|>x'])


def test_clips_own_byte_pairs_are_pythons(tmp_path):
  """CLIP's own file, with merges learnt here. What only ftfy can tell, texts that were decoded wrongly, is left out."""
  hf, ftfy = pytest.importorskip('tokenizers'), pytest.importorskip('ftfy')
  made = hf.Tokenizer(hf.models.BPE(end_of_word_suffix='</w>'))
  made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  captions = [text[:5000] for text in texts(5200) if ftfy.fix_encoding(text) == text]
  made.train_from_iterator(captions[len(LONG):1000], hf.trainers.BpeTrainer(
    vocab_size=1500, show_progress=False, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix='</w>'))
  merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in json.loads(made.to_str())['model']['merges']]
  (tmp_path / 'tokenizer.gz').write_bytes(gzip.compress('\n'.join(['#version', *merges]).encode()))
  assert len(captions) > 5000
  check_ids(tmp_path / 'tokenizer.gz', 77, [
    *captions, 'Tom &amp; Jerry’s “house” &#39;x&#x27; &amp;lt;b', 'o’clock ‘x’', 'a <end_of_text> b', '!?! a!b', 'ΣΊΣΥΦΟΣ'])


def test_wrong_tokenizers_say_so(tmp_path):
  (tmp_path / 'a').write_bytes(b'\x0a\xff\xff\xff')
  (tmp_path / 'b').write_text('{"model": {"type": "WordPiece"}}')
  (tmp_path / 'c').write_bytes(gzip.compress(b'nonsense')[:-9])
  for name, words in (('a', 'is damaged'), ('b', 'is of type WordPiece'), ('c', 'is damaged')):
    assert words in page_in_node.call(tokens=dict(file=str(tmp_path / name), special={}, context=9, texts=['a']))['error']


def test_resized_pixels_are_pythons_to_the_last_bit():
  rng = np.random.default_rng(0)
  shapes = [(32, 32), (33, 47), (64, 64), (100, 31), (31, 100), (7, 9), (1, 5), (301, 200), (128, 129), (35, 34), (32, 64),
            (200, 3), (3, 199), (161, 10), (1, 100)]
  images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
  rgba = [np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]) for image in images]
  for size in (32, 48):
    given = [dict(data=base64.b64encode(image.tobytes()).decode(), width=image.shape[1], height=image.shape[0])
             for image in rgba]
    got = page_in_node.call(resize=dict(size=size, images=given))['resize']
    for image, pixels in zip(images, got, strict=True):
      expected = transforms.evaluation_transform(image, size)
      np.testing.assert_array_equal(np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(expected.shape), expected)


@pytest.mark.parametrize('patches, words', [(9, 3), (3, 9), (4, 4), (16, 1)])
def test_the_matching_is_the_trainings(patches, words):
  from lightclip_jax.objectives import sinkhorn_plan

  rng = np.random.default_rng(patches)
  sides = [rng.normal(size=(count, 8)).astype(np.float32) for count in (patches, words)]
  sides = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides]
  flat = [side.ravel().tolist() for side in sides]
  got = np.reshape(page_in_node.call(plan=dict(patches=flat[0], words=flat[1], dim=8, epsilon=0.05))['plan'], (patches, words))
  np.testing.assert_allclose(got.sum(axis=0 if patches > words else 1), 1, atol=1e-4)   # of the smaller side each once
  assert got.sum(axis=0).max() < 1.001 and got.sum(axis=1).max() < 1.001
  expected = sinkhorn_plan(1 - sides[0] @ sides[1].T, np.ones(patches, bool), np.ones(words, bool), num_iterations=200)
  np.testing.assert_allclose(got, expected, atol=2e-3)


def test_rankings_and_words():
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(50, 8)).astype(np.float32)
  vectors[20:30] = vectors[3]
  got = page_in_node.call(nearest=dict(vectors=vectors.ravel().tolist(), query=vectors[3].tolist(), top=15),
                          words=dict(pieces=['▁sm', 'iling', '▁', 'cat</w>', '▁x']))
  rows, cosines = ranking.nearest(vectors, vectors[3], 15)
  assert [answer['row'] for answer in got['nearest']] == rows.tolist()
  np.testing.assert_allclose([answer['cosine'] for answer in got['nearest']], cosines, rtol=1e-12)
  expected = [(''.join(word.values()), list(word)) for word in join_pieces(['▁sm', 'iling', '▁', 'cat</w>', '▁x'])]
  assert [(word['word'], word['places']) for word in got['words']] == expected
