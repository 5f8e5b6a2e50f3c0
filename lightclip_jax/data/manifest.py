"""What a prepared folder says about itself: `manifest.json` beside the shards."""
import dataclasses
import json
import pathlib
from typing import Any

from lightclip_jax import storage
from lightclip_jax.errors import UserError

FILE_NAME = 'manifest.json'
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Split:
  """The shards of one split, in order, and the number of records in all of them."""
  shards: tuple[str, ...]
  count: int


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Whose embeddings of `train` lie beside the shards (data/teacher.py)."""
  name: str
  dim: int                     # of an embedding
  sha256: str                  # of its files

  def __post_init__(self) -> None:
    if type(self.dim) is not int or self.dim < 1:
      raise ValueError(f"the teacher's dim is {self.dim!r}")


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Contents of a prepared folder; written last, so a folder that has one is complete."""
  name: str
  splits: dict[str, Split]
  tokenizer: str               # file name
  image_size: int              # pixels of the longer side at most
  concepts: tuple[str, ...]    # every name that can be asked for, sorted
  groups: tuple[str, ...]
  licences: dict[str, str]     # style -> SPDX identifier
  packages: dict[str, str]     # source package -> version
  sha256: dict[str, str]       # file -> hash of its bytes
  format: int = FORMAT
  # Where the records lie elsewhere, and the folder only says so (`sources.open_parts`).
  source: dict[str, Any] = dataclasses.field(default_factory=dict)
  teacher: Teacher | None = None
  asked: dict[str, Any] = dataclasses.field(default_factory=dict)   # of `convert`; {} also where an older version made it

  @property
  def max_pixels(self) -> int:
    """Of an image that `prepare` let through; 0 where it is not known."""
    return self.asked.get('max_pixels', 0)

  def split(self, name: str) -> Split:
    """The named split, or a UserError that lists those there are."""
    if name not in self.splits:
      raise UserError(f'data set {self.name!r} has no split {name!r}; it has: {", ".join(self.splits)}')
    return self.splits[name]

  def save(self, folder: pathlib.Path) -> None:
    """Writes `manifest.json` into `folder`, over an older one at once."""
    text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
    temporary = folder / f'.{FILE_NAME}.tmp'
    temporary.write_text(text + '\n', encoding='utf-8')
    temporary.replace(folder / FILE_NAME)


def load(folder: str | storage.Path) -> Manifest:
  """The manifest of a prepared folder.

  Raises:
    UserError: if the folder is missing, empty, not made by `lightclip_jax.prepare`, or of another format version.
  """
  folder = storage.path(folder)
  file = folder / FILE_NAME
  if not file.is_file():
    what = ('is not a folder' if not folder.is_dir() else
            f'has no {FILE_NAME}' if any(folder.iterdir()) else 'is empty')
    raise UserError(f'data folder {str(folder)!r} {what}; make one with: python -m lightclip_jax.prepare')
  try:
    values = json.loads(file.read_text(encoding='utf-8'))
    if values['format'] != FORMAT:
      raise UserError(f'{file} has format {values["format"]!r}; this version reads {FORMAT}: prepare it again')
    return _from_json(values)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'{file} is not a manifest of lightclip_jax.prepare ({type(error).__name__}: {error})') from error


def _from_json(values: dict[str, Any]) -> Manifest:
  splits = {name: Split(tuple(s['shards']), s['count']) for name, s in values['splits'].items()}
  names = {key: tuple(values[key]) for key in ('concepts', 'groups')}
  teacher = Teacher(**values['teacher']) if values.get('teacher') else None
  return Manifest(**{**values, **names, 'splits': splits, 'teacher': teacher})
