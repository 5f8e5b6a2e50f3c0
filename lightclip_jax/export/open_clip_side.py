"""Runs in an interpreter that has open_clip: embeddings of given inputs by an exported folder. Imports nothing of ours.

    python open_clip_side.py FOLDER IN.npz OUT.npz
"""
import sys

import numpy as np
import torch

BATCH = 256

# torchvision without its compiled operators registers fakes for them at import; this declares the operators by name.
if not hasattr(torch.ops.torchvision, 'nms'):
  _library = torch.library.Library('torchvision', 'DEF')
  for _name in ('nms', 'qnms', 'roi_align', '_roi_align_backward', 'roi_pool', '_roi_pool_backward', 'ps_roi_align',
                '_ps_roi_align_backward', 'ps_roi_pool', '_ps_roi_pool_backward', 'deform_conv2d', '_deform_conv2d_backward'):
    _library.define(f'{_name}(Tensor x) -> Tensor')


def main(folder: str, source: str, target: str) -> None:
  """Images are uint8 [N, S, S, 3] and pass through open_clip's own normalisation; texts are token ids, or strings, which
  pass through its own tokenizer."""
  import open_clip
  import PIL.Image
  model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{folder}')
  model.eval()
  out = {}
  with torch.no_grad():
    for name, rows in np.load(source).items():
      if rows.dtype.kind == 'U':
        rows = out[f'ids/{name}'] = open_clip.get_tokenizer(f'local-dir:{folder}')(rows.tolist()).numpy()
      parts = np.array_split(rows, -(-len(rows) // BATCH))
      if name.startswith('image'):
        batches = (torch.stack([preprocess(PIL.Image.fromarray(row)) for row in part]) for part in parts)
        out[name] = np.concatenate([model.encode_image(batch, normalize=True).numpy() for batch in batches])
      else:
        batches = (torch.from_numpy(part).long() for part in parts)
        out[name] = np.concatenate([model.encode_text(batch, normalize=True).numpy() for batch in batches])
  np.savez(target, **out)


if __name__ == '__main__':
  main(*sys.argv[1:])
