"""Text to token ids. Every kind knows its special tokens, so that they are never masked or matched.

Letters: N texts, W text positions.
"""
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from lightclip_jax import storage
from lightclip_jax.errors import UserError


class Tokenizer(Protocol):
  """What the pipeline, the model's checks and the plots need of a tokenizer."""
  vocab_size: int
  pad_id: int
  start_id: int
  end_id: int
  mask_id: int
  special_ids: tuple[int, ...]      # never masked, matched or drawn as random words; unknown words are not special

  def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
    """int32 [N, W=context]: start, words, end, padding. Longer texts lose words; the end token stays."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the ids, special tokens left out."""

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """One readable string an id, for plots."""

  def word_mask(self, tokens: np.ndarray) -> np.ndarray:
    """bool, shape of `tokens`: true for words, false for special tokens and padding."""

  def to_bytes(self) -> bytes:
    """All of it, so that it travels in a checkpoint; `from_bytes` reads it."""


class SentencePieceTokenizer:
  """A SentencePiece model with pad, start, end and [MASK] tokens. Raises UserError for a model without them."""

  def __init__(self, model: bytes):
    self._model = model
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise UserError(f'a file of {len(model)} bytes is not a SentencePiece model') from error
    processor = self._processor
    self.vocab_size = processor.vocab_size()
    self.pad_id, self.start_id, self.end_id = processor.pad_id(), processor.bos_id(), processor.eos_id()
    self.mask_id = processor.piece_to_id('[MASK]')
    self.special_ids = (self.pad_id, self.start_id, self.end_id, self.mask_id)
    self._is_word = ~np.isin(np.arange(self.vocab_size), self.special_ids)
    if min(self.special_ids) < 0 or self.mask_id == processor.unk_id():
      raise UserError('the SentencePiece model lacks a pad, start, end or [MASK] token; train one with '
                      'lightclip_jax.data.tokenizers.train')

  def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
    """See `Tokenizer.encode`."""
    tokens_NxW = np.full((len(texts), context), self.pad_id, np.int32)
    for row_W, text in zip(tokens_NxW, texts, strict=True):   # one by one: a list starts a pool of threads every time
      words = [self.start_id, *self._processor.encode(text)[:context - 2], self.end_id]
      row_W[:len(words)] = words
    return tokens_NxW

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer.decode`."""
    return self._processor.decode([int(i) for i in ids if int(i) not in self.special_ids])

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """See `Tokenizer.pieces`; "▁" marks the start of a word."""
    return [self._processor.id_to_piece(int(i)) for i in ids]

  def word_mask(self, tokens: np.ndarray) -> np.ndarray:
    """See `Tokenizer.word_mask`."""
    return self._is_word[tokens]

  def to_bytes(self) -> bytes:
    """See `Tokenizer.to_bytes`."""
    return self._model

  def __reduce__(self):
    return SentencePieceTokenizer, (self._model,)


class HuggingFaceTokenizer:
  """A `tokenizer.json` that puts a start and an end token around a text, as CLIP's BPE does; `mask_id` is -1 where it has
  no [MASK]. Raises UserError for another file."""

  def __init__(self, data: bytes):
    import tokenizers as library  # here alone: SentencePiece does without
    self._data = data
    try:
      self._tokenizer = library.Tokenizer.from_buffer(data)
      empty = self._tokenizer.encode('').ids
    except Exception as error:   # the library raises nothing more special
      raise UserError(f'a file of {len(data)} bytes is not a Hugging Face tokenizer.json ({error})') from error
    if len(empty) != 2:
      raise UserError(f'the tokenizer gives an empty text {len(empty)} tokens; it must give two, start and end')
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self.vocab_size = self._tokenizer.get_vocab_size()
    self.start_id, self.end_id = empty
    number = lambda *names: next((i for i in map(self._tokenizer.token_to_id, names) if i is not None), -1)  # noqa: E731
    self.pad_id, self.mask_id = max(0, number('<pad>', '[PAD]')), number('[MASK]', '<mask>')
    self.special_ids = tuple(i for i in (self.pad_id, self.start_id, self.end_id, self.mask_id) if i >= 0)
    self._is_word = ~np.isin(np.arange(self.vocab_size), self.special_ids)

  def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
    """See `Tokenizer.encode`."""
    tokens_NxW = np.full((len(texts), context), self.pad_id, np.int32)
    for row_W, text in zip(tokens_NxW, texts, strict=True):
      words = self._tokenizer.encode(text).ids
      words = [*words[:context - 1], self.end_id] if len(words) > context else words
      row_W[:len(words)] = words
    return tokens_NxW

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer.decode`."""
    return self._tokenizer.decode([int(i) for i in ids if int(i) not in self.special_ids])

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """See `Tokenizer.pieces`."""
    return [self._tokenizer.id_to_token(int(i)) for i in ids]

  def word_mask(self, tokens: np.ndarray) -> np.ndarray:
    """See `Tokenizer.word_mask`."""
    return self._is_word[tokens]

  def to_bytes(self) -> bytes:
    """See `Tokenizer.to_bytes`."""
    return self._data

  def __reduce__(self):
    return HuggingFaceTokenizer, (self._data,)


def train(captions: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
  """A lower-casing unigram model: pad 0, unknown 1, start 2, end 3, [MASK] 4 (a control symbol: no text becomes it).

  The vocabulary is `vocab_size`, or what the captions can fill if that is less.

  Raises:
    UserError: if the captions hold no text or `vocab_size` is too small for their letters.
  """
  lines = [line for line in captions if line.strip()]
  if not lines:
    raise UserError('a tokenizer needs captions to learn from; there are none')
  out = io.BytesIO()
  try:
    # One thread: the model depends on the captions only. All letters stay: a name in a rare script must not be <unk>.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size, model_type='unigram', num_threads=1,
        normalization_rule_name='nmt_nfkc_cf', character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols=['[MASK]'])
  except RuntimeError as error:
    raise UserError(f'cannot train a tokenizer of {vocab_size} pieces on {len(lines)} captions: {error}') from error
  return SentencePieceTokenizer(out.getvalue())


KINDS: dict[str, Callable[[bytes], Tokenizer]] = {   # by file suffix
    '.model': SentencePieceTokenizer, '.json': HuggingFaceTokenizer}


def from_bytes(data: bytes, suffix: str = '.model') -> Tokenizer:
  """The tokenizer whose `to_bytes` gave `data`; `suffix` says of which kind."""
  return KINDS[suffix](data)


def load(path: str | storage.Path) -> Tokenizer:
  """The tokenizer in a file, its kind told by the suffix.

  Raises:
    UserError: if there is no such file, or no such kind.
  """
  path = storage.path(path)
  if not path.is_file():
    raise UserError(f'there is no tokenizer file {str(path)!r}')
  if path.suffix not in KINDS:
    raise UserError(f'{str(path)!r} is no known kind of tokenizer; known suffixes: {", ".join(KINDS)}')
  return from_bytes(path.read_bytes(), path.suffix)
