"""Data sets of TensorFlow Datasets that are prepared already, read by `tfds.data_source`, without TensorFlow.

Named NAME[/CONFIG][:VERSION][@SPLIT]; a class label becomes concept and caption where there is no text.
"""
from typing import Any, SupportsIndex

import numpy as np

from lightclip_jax.data import captions, indexes
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError

_CAPTION_FEATURES = ('caption', 'captions', 'text', 'title')
_IMAGE_FEATURE, _LABEL_FEATURE = 'image', 'label'


class TfdsSource:
  """Random access to one split, images left encoded. `data.image_root` is TFDS' data folder; '': TFDS' own."""

  def __init__(self, spec: Spec):
    """Raises UserError if the set is not prepared as ArrayRecord, or has neither captions nor labels with names."""
    import tensorflow_datasets as tfds  # a second to import
    self.spec = spec
    name, _, split = spec.path.partition('@')
    try:
      builder = tfds.builder(name, data_dir=spec.image_root or None, file_format='array_record')
      self._image = spec.image_column or _IMAGE_FEATURE
      self._caption = self._caption_feature(builder.info.features, spec.caption_column)
      feature = builder.info.features[self._caption]
      self._names = feature.names if isinstance(feature, tfds.features.ClassLabel) else []
      if not self._names:
        self._check_texts(feature.np_dtype)
      self._data = builder.as_data_source(split or 'train', decoders={self._image: tfds.decode.SkipDecoding()})
    except UserError:
      raise
    except Exception as error:   # TFDS has no error of its own
      raise UserError(f'cannot read the TFDS set {spec.path!r} ({str(error).strip().splitlines()[0]})') from error
    self.fingerprint = indexes.digest([builder.info.full_name, split, len(self._data)])

  def _caption_feature(self, features: Any, wanted: str) -> str:
    for name in (wanted,) if wanted else (*_CAPTION_FEATURES, _LABEL_FEATURE):
      if name in features:
        return name
    raise UserError(f'the TFDS set {self.spec.path!r} has no {wanted or "captions or label"}; it has: {", ".join(features)}')

  def _check_texts(self, dtype: Any) -> None:
    """`dtype`: NumPy's, or a dict where the feature has several parts, as COCO's captions."""
    if not isinstance(dtype, dict) and np.dtype(dtype).kind not in 'OSU':
      raise UserError(f'{self._caption!r} of the TFDS set {self.spec.path!r} is {np.dtype(dtype)} without names; '
                      'captions must be text or a class label')

  def __len__(self) -> int:
    return len(self._data)

  def name(self, index: int) -> str:
    """Set and number."""
    return f'{self.spec.path} {index}'

  def __getitem__(self, index: SupportsIndex) -> Record:
    try:
      example = self._data[index]
      image, value = example[self._image], example[self._caption]
    except Exception as error:   # whatever its readers raise for a record that is malformed
      raise BadRecord('damaged', str(error).strip().splitlines()[0] if str(error).strip() else '') from error
    if not isinstance(image, bytes):
      raise BadRecord('damaged', 'the image is not encoded')
    if self._names:
      if not 0 <= value < len(self._names):    # -1 is TFDS' for no label, and a list's for its last name
        raise BadRecord('no_caption', f'label {value}')
      concept = self._names[int(value)].replace('_', ' ')
      return Record(f'{int(index)}', image, (concept,), concept=concept)
    return Record(f'{int(index)}', image, captions.of_value(_texts(value)))

  def __reduce__(self) -> tuple[Any, ...]:
    return TfdsSource, (self.spec,)


def _texts(value: Any) -> Any:
  """A string, or the list in {'text': [...]} (COCO's captions) or an array of strings."""
  value = value.get('text', value.get('caption')) if isinstance(value, dict) else value
  return list(value) if hasattr(value, '__len__') and not isinstance(value, (str, bytes)) else value
