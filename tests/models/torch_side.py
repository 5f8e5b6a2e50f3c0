"""Runs under an interpreter that has PyTorch, timm and open_clip: random towers, their weights and outputs as .npz.

    python torch_side.py TOWER OUT.npz
"""
import sys

import numpy as np
import torch

# torchvision without its compiled operators registers fakes for them at import; this declares the operators by name.
_library = torch.library.Library('torchvision', 'DEF')
for _name in ('nms', 'qnms', 'roi_align', '_roi_align_backward', 'roi_pool', '_roi_pool_backward', 'ps_roi_align',
              '_ps_roi_align_backward', 'ps_roi_pool', '_ps_roi_pool_backward', 'deform_conv2d',
              '_deform_conv2d_backward'):
  _library.define(f'{_name}(Tensor x) -> Tensor')


def image_tower(name):
  import timm
  size = 224
  if name == 'swin_nano':
    model = timm.models.swin_transformer.SwinTransformer(
        embed_dim=48, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7, num_classes=0)
  else:
    model = timm.create_model({'mobilenet_v2': 'mobilenetv2_100', 'resnet18': 'resnet18',
                               'vit_ti': 'vit_tiny_patch16_224'}[name], num_classes=0)
  randomize(model)
  x = torch.randn(2, 3, size, size)
  return model, x, {'inputs': x.permute(0, 2, 3, 1), 'pooled': model.eval()(x)}


def text_tower():
  import open_clip
  model = open_clip.CLIP(
      embed_dim=32, vision_cfg=dict(layers=1, width=64, patch_size=16, image_size=32),
      text_cfg=dict(context_length=20, vocab_size=100, width=64, heads=4, layers=3))
  randomize(model)
  tokens = torch.randint(1, 90, (4, 20))
  for row, end in enumerate((19, 5, 10, 12)):
    tokens[row, end] = 99   # CLIP pools at the largest id
    tokens[row, end + 1:] = 0
  return model, tokens, {'inputs': tokens, 'pooled': model.eval().encode_text(tokens)}


def randomize(model):
  """Weights that are alive everywhere: no zero scale, no trivial statistics."""
  generator = torch.Generator().manual_seed(0)
  for name, value in [*model.named_parameters(), *model.named_buffers()]:
    if not value.is_floating_point():
      continue
    noise = torch.randn(value.shape, generator=generator)
    if name.endswith('running_var'):
      value.data = 1 + 0.3 * noise.abs()
    elif name.endswith('running_mean'):
      value.data = 0.1 * noise
    elif value.ndim <= 1 and 'mask' not in name:
      value.data = value.data.clamp(0.5, 1) + 0.1 * noise if name.endswith('weight') else 0.1 * noise
    elif 'table' in name or 'embed' in name or name == 'cls_token':
      value.data = value.data + 0.1 * noise


if __name__ == '__main__':
  torch.manual_seed(0)
  tower, out = sys.argv[1:]
  with torch.no_grad():
    model, _, arrays = text_tower() if tower == 'text' else image_tower(tower)
  arrays = {f'io/{k}': v for k, v in arrays.items()} | {f'weight/{k}': v for k, v in model.state_dict().items()}
  np.savez(out, **{k: v.detach().numpy() for k, v in arrays.items()})
