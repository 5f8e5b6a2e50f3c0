"""What a source is told: where the data are, how their columns are called, and where its index is kept."""
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spec:
  """One source as a user names it. Strings only, so that it lies in a manifest as it is."""
  kind: str
  path: str
  image_column: str = ''       # '': the usual names of the kind
  caption_column: str = ''
  image_root: str = ''         # folder that image paths are relative to; '': that of the file with the paths
  index: str = ''              # folder for the source's index

  def json(self) -> dict[str, Any]:
    """For a manifest."""
    return dataclasses.asdict(self)
