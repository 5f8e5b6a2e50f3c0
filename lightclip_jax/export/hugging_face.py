"""Our tokenizer as Hugging Face's `tokenizer.json`, which open_clip, transformers and browsers read."""
import json
import pathlib
from typing import Any

import numpy as np

from lightclip_jax.data.tokenizers import Tokenizer
from lightclip_jax.inference.exported import optional

_PROBES = ('Hello,  World!', ' a red heart ', 'ＦＵＬＬ width', 'naïve café', 'family: man, woman, girl', '😀 face', '')


def write(tokenizer: Tokenizer, context: int, folder: pathlib.Path) -> bool:
  """Writes `tokenizer.json` and `tokenizer_config.json`, so that transformers, and open_clip with it, give the same ids.

  Returns:
    False, and no file, for CLIP's byte pairs, which open_clip has itself, and where the ids would not all be the same.
  """
  if tokenizer.suffix == '.gz':
    return False
  if tokenizer.suffix == '.model':
    converted = convert(tokenizer)
    if not _same(converted, tokenizer, context):
      return False
    converted.save(str(folder / 'tokenizer.json'))
  else:
    (folder / 'tokenizer.json').write_bytes(tokenizer.to_bytes())
  pad, start, end = tokenizer.pieces((tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id))
  (folder / 'tokenizer_config.json').write_text(json.dumps({
    'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': context, 'padding_side': 'right',
    'truncation_side': 'right', 'pad_token': pad, 'bos_token': start, 'eos_token': end,
    'split_special_tokens': True,   # "[MASK]" in a caption is text like any other
    'clean_up_tokenization_spaces': False}, indent=2) + '\n')
  return True


def _same(converted: Any, tokenizer: Tokenizer, context: int) -> bool:
  for text, expected in zip(_PROBES, tokenizer.encode(_PROBES, context), strict=True):
    ids = converted.encode(text).ids
    ids = ids if len(ids) <= context else [*ids[:context - 1], tokenizer.end_id]
    if not np.array_equal(ids, expected[:len(ids)]) or (expected[len(ids):] != tokenizer.pad_id).any():
      return False
  return True


def convert(tokenizer: Tokenizer) -> Any:
  """A SentencePiece unigram model as a `tokenizers.Tokenizer`.

  Raises:
    UserError: if tokenizers is not installed.
  """
  lib, proto = optional('tokenizers'), optional('sentencepiece.sentencepiece_model_pb2').ModelProto()
  for module in ('models', 'normalizers', 'pre_tokenizers', 'processors', 'decoders'):
    optional(f'tokenizers.{module}')
  proto.ParseFromString(tokenizer.to_bytes())
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  out = lib.Tokenizer(lib.models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
  steps = [lib.normalizers.Strip(), lib.normalizers.Replace(lib.Regex(' {2,}'), ' ')]
  charsmap = proto.normalizer_spec.precompiled_charsmap
  out.normalizer = lib.normalizers.Sequence([lib.normalizers.Precompiled(charsmap), *steps] if charsmap else steps)
  out.pre_tokenizer = lib.pre_tokenizers.Metaspace(replacement='▁', prepend_scheme='always')
  out.decoder = lib.decoders.Metaspace(replacement='▁', prepend_scheme='always')
  start, end = (pieces[i][0] for i in (tokenizer.start_id, tokenizer.end_id))
  out.post_processor = lib.processors.TemplateProcessing(
    single=f'{start} $A {end}', special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)])
  out.add_special_tokens([pieces[i][0] for i in tokenizer.special_ids])
  return out
