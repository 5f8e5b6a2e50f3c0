"""Text to token ids. Every kind knows its special tokens, so that they are never masked or matched.

Letters: N texts, W text positions.
"""
import gzip
import html
import io
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from lightclip_jax import storage
from lightclip_jax.errors import UserError


class Tokenizer(Protocol):
  """What the pipeline, the model's checks and the plots need of a tokenizer."""
  suffix: str                       # of its file, which tells its kind
  vocab_size: int
  pad_id: int
  start_id: int
  end_id: int
  mask_id: int
  special_ids: tuple[int, ...]      # never masked, matched or drawn as random words; unknown words are not special

  def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
    """int32 [N, W=context]: start, words, end, padding. Longer texts lose words; the end token stays.

    Raises:
      UserError: for a text that has no UTF-8 form.
    """

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the ids, special tokens left out."""

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """One readable string an id, for plots."""

  def word_mask(self, tokens: np.ndarray) -> np.ndarray:
    """bool, shape of `tokens`: true for words, false for special tokens and padding."""

  def to_bytes(self) -> bytes:
    """All of it, so that it travels in a checkpoint; `from_bytes` reads it."""


class _OfFile:
  """What all kinds do alike with the bytes of their file, `_model`, and with the ids of one text, `_ids`."""
  suffix: str
  pad_id: int
  start_id: int
  end_id: int
  _model: bytes

  def _ids(self, text: str) -> list[int]:
    """Of the words alone."""
    raise NotImplementedError

  def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
    """See `Tokenizer.encode`."""
    tokens_NxW = np.full((len(texts), context), self.pad_id, np.int32)
    for row_W, text in zip(tokens_NxW, texts, strict=True):   # one by one: a list starts a pool of threads every time
      _check_utf8(text)
      words = [self.start_id, *self._ids(text)[:context - 2], self.end_id]
      row_W[:len(words)] = words
    return tokens_NxW

  def to_bytes(self) -> bytes:
    """See `Tokenizer.to_bytes`."""
    return self._model

  def __reduce__(self) -> tuple[Any, ...]:
    return type(self), (self._model,)


def _check_utf8(text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:   # the terminal's bytes, or a folder's name; SentencePiece's error says nothing of it
    raise UserError(f'the text {text[:60]!r} is not UTF-8') from error


class SentencePieceTokenizer(_OfFile):
  """A SentencePiece model with pad, start, end and [MASK] tokens. Raises UserError for a model without them."""
  suffix = '.model'

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

  def _ids(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer.decode`."""
    return self._processor.decode([int(i) for i in ids if int(i) not in self.special_ids])

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """See `Tokenizer.pieces`; "▁" marks the start of a word."""
    return [self._processor.id_to_piece(int(i)) for i in ids]

  def word_mask(self, tokens: np.ndarray) -> np.ndarray:
    """See `Tokenizer.word_mask`."""
    return self._is_word[tokens]


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


class HuggingFaceTokenizer(_OfFile):
  """A `tokenizer.json` of Hugging Face that puts a start and an end token around a text. Raises UserError for another file.

  Its padding and length are left aside. Where it has no mask token, one more id after its last stands for it.
  """
  suffix = '.json'

  def __init__(self, model: bytes):
    import tokenizers as library  # here alone: SentencePiece does without
    self._model = model
    try:
      self._fast = library.Tokenizer.from_buffer(model)
    except Exception as error:   # the library raises nothing more special
      raise UserError(f'a file of {len(model)} bytes is not a Hugging Face tokenizer.json ({str(error)[:80]})') from error
    self._fast.no_padding()
    empty = self._fast.encode('').ids
    if len(empty) != 2:
      raise UserError(f'the tokenizer gives an empty text {len(empty)} tokens; it must give two, start and end')
    pad = next((i for i in map(self._fast.token_to_id, ('<pad>', '[PAD]', '<|pad|>')) if i is not None), 0)
    self._finish(pad, *empty)

  def _finish(self, pad: int, start: int, end: int) -> None:
    """Takes the special ids; `pad` may be an ordinary word's, since padding is told by its place."""
    fast = self._fast
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True   # "[MASK]" in a caption is text like any other
    known = fast.get_vocab(with_added_tokens=True)
    mask = next((known[name] for name in ('[MASK]', '<mask>') if name in known), max(known.values()) + 1)
    self.vocab_size = max(*known.values(), mask) + 1
    self.pad_id, self.start_id, self.end_id, self.mask_id = pad, start, end, mask
    self.special_ids = tuple(dict.fromkeys((start, end, mask) if self._is_ordinary(pad) else (pad, start, end, mask)))

  def _is_ordinary(self, number: int) -> bool:
    return number not in self._fast.get_added_tokens_decoder()

  def _ids(self, text: str) -> list[int]:
    return self._fast.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer.decode`."""
    ids = np.asarray(ids)
    return self._fast.decode(ids[self.word_mask(ids)].tolist()).strip()

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """See `Tokenizer.pieces`."""
    return [self._fast.id_to_token(int(i)) or '[MASK]' for i in ids]

  def word_mask(self, tokens: np.ndarray) -> np.ndarray:
    """See `Tokenizer.word_mask`; what follows the end token is padding."""
    before_end = np.cumsum(tokens == self.end_id, axis=-1) == 0
    return before_end & ~np.isin(tokens, self.special_ids)


class ClipTokenizer(HuggingFaceTokenizer):
  """OpenAI CLIP's byte pairs from `bpe_simple_vocab_16e6.txt.gz`; its ids are open_clip's, and one more is [MASK].

  Texts are cleaned as there: ftfy, HTML entities, white space, lower case. Padding is 0, which also is "!".
  """
  suffix = '.gz'
  _MERGES = 49152 - 256 - 2
  _WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"   # ſ is an s where case is ignored, as there

  def __init__(self, model: bytes):
    import ftfy
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    self._model, self._fix = model, ftfy.fix_text
    try:
      lines = gzip.decompress(model).decode().split('\n')
      merges = [(left, right) for left, right in map(str.split, lines[1:self._MERGES + 1])]
    except (OSError, EOFError, ValueError, zlib.error) as error:
      raise UserError(f"a file of {len(model)} bytes is not CLIP's vocabulary of byte pairs ({error})") from error
    letters = _byte_letters()
    pieces = [*letters, *(letter + '</w>' for letter in letters), *(left + right for left, right in merges),
              '<start_of_text>', '<end_of_text>']
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    self._fast = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix='</w>'))
    self._fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(self._WORDS), 'removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    self._fast.decoder = decoders.Sequence([decoders.Replace('</w>', 'Ġ'), decoders.ByteLevel()])   # that letter is a space
    self._finish(0, vocabulary['<start_of_text>'], vocabulary['<end_of_text>'])

  def _is_ordinary(self, number: int) -> bool:
    return number == self.pad_id

  def _ids(self, text: str) -> list[int]:
    text = html.unescape(html.unescape(self._fix(text))).strip()
    return super()._ids(re.sub(r'\s+', ' ', text).strip().lower())


def _byte_letters() -> list[str]:
  """A visible letter for each byte, in the order of GPT-2's byte pairs: printable ones stand for themselves."""
  visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
  return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]


KINDS: dict[str, Callable[[bytes], Tokenizer]] = {   # by file suffix
    '.model': SentencePieceTokenizer,
    '.json': HuggingFaceTokenizer,
    '.gz': ClipTokenizer,
}


def fits(tokenizer: Tokenizer, caption: str, context: int) -> bool:
  """Whether no word of the caption would be cut off."""
  # One position more than it has: what fills that would be.
  longer, tokens = (tokenizer.word_mask(tokenizer.encode([caption], length)[0]).sum() for length in (context + 1, context))
  return bool(longer == tokens)


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
