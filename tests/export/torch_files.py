"""Runs under an interpreter that has PyTorch and torchvision: a random MobileNetV2 as .pth in both formats, and its features.

    python torch_files.py FOLDER

With `open_clip` behind the folder: the random weights of the model that its `open_clip_config.json` describes.
"""
import json
import pathlib
import sys

import numpy as np
import torch

# torchvision without its compiled operators registers fakes for them at import; this declares the operators by name.
_library = torch.library.Library('torchvision', 'DEF')
for _name in ('nms', 'qnms', 'roi_align', '_roi_align_backward', 'roi_pool', '_roi_pool_backward', 'ps_roi_align',
              '_ps_roi_align_backward', 'ps_roi_pool', '_ps_roi_pool_backward', 'deform_conv2d', '_deform_conv2d_backward'):
  _library.define(f'{_name}(Tensor x) -> Tensor')

def alive(model):
  """With statistics that are not trivial."""
  for name, value in model.named_buffers():
    if name.endswith('running_mean'):
      value.normal_(0, 0.1)
    elif name.endswith('running_var'):
      value.uniform_(0.7, 1.3)
  return model.eval()


def open_clip_weights(folder):
  import open_clip
  import safetensors.torch
  config = json.loads((folder / 'open_clip_config.json').read_text())['model_cfg']
  model = alive(open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != 'custom_text'}))
  safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()},
                              folder / 'open_clip_model.safetensors')


if __name__ == '__main__':
  torch.manual_seed(0)
  folder = pathlib.Path(sys.argv[1])
  if sys.argv[2:] == ['open_clip']:
    open_clip_weights(folder)
    sys.exit()
  from torchvision.models import mobilenet_v2
  model = alive(mobilenet_v2())
  images = torch.randn(2, 3, 64, 64)
  with torch.no_grad():
    features = model.features(images).mean((2, 3))
  torch.save(model.state_dict(), folder / 'zip.pth')
  torch.save({'epoch': 1, 'state_dict': model.state_dict()}, folder / 'legacy.pth', _use_new_zipfile_serialization=False)
  torch.save(model, folder / 'module.pth')   # a whole module: code by name
  np.savez(folder / 'io.npz', images=images.permute(0, 2, 3, 1).numpy(), features=features.numpy())
