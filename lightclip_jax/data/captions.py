"""Captions out of files that anyone may have written."""
import html
import json
import re
import unicodedata
from typing import Any

from lightclip_jax.data.faults import BadRecord

_KEYS = ('caption', 'captions', 'text', 'title')   # of JSON
_LINE_END = re.compile(r'\r\n?|\n')   # `str.splitlines` also cuts at U+2028, U+0085 and others that a caption may hold


def of_value(value: Any) -> tuple[str, ...]:
  """One caption or a list of them, without the blank ones.

  Raises:
    BadRecord: if none is left, or one is not text that has a UTF-8 form.
  """
  texts = value if isinstance(value, (list, tuple)) else [value]
  texts = [_text(text) if isinstance(text, bytes) else text for text in texts if text is not None]
  for text in texts:
    if not isinstance(text, str):
      raise BadRecord('bad_caption', f'{type(text).__name__} {text!r:.80}')
    if not _has_utf8(text):
      raise BadRecord('bad_caption')
  if not (kept := tuple(text.strip() for text in texts if text.strip())):
    raise BadRecord('no_caption')
  return kept


def clean(text: str) -> str:
  """Without HTML entities, control characters and repeated white space."""
  text = ''.join(' ' if unicodedata.category(letter) == 'Cc' else letter for letter in html.unescape(html.unescape(text)))
  return ' '.join(text.split())


def of_lines(data: bytes) -> tuple[str, ...]:
  """One caption a line of a text file. Raises as `of_value`."""
  return of_value(_LINE_END.split(_text(data)))


def of_json(data: bytes, key: str = '') -> tuple[str, ...]:
  """The captions of a JSON object under `key`, or under the first usual name that it has, and not as null.

  Raises as `of_value`.
  """
  try:
    values = json.loads(_text(data))
  except (ValueError, RecursionError) as error:
    raise BadRecord('damaged', 'no JSON') from error
  return of_value(first(values, (key,) if key else _KEYS) if isinstance(values, dict) else None)


def at(source: Any, index: int) -> tuple[str, ...]:
  """The captions of a source's record; the image is not read where the source has the method `captions(index)`."""
  return source.captions(index) if hasattr(source, 'captions') else source[index].captions


def first(values: dict[str, Any], keys: tuple[str, ...]) -> Any:
  """The value of the first key that has one; None if there is none."""
  return next((values[key] for key in keys if values.get(key) is not None), None)


def _text(data: bytes) -> str:
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise BadRecord('bad_caption') from error


def _has_utf8(text: str) -> bool:
  try:
    text.encode()   # a lone surrogate, which JSON can write, has no UTF-8 form
  except UnicodeEncodeError:
    return False
  return True
