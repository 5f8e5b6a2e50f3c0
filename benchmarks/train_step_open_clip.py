"""open_clip's training step, as its own loop makes it; `benchmarks/train_step.py` starts it in an interpreter with PyTorch.

Imports nothing of ours. Arguments: TOWER DTYPE COMPILE BATCH SIZE CONTEXT VOCABULARY WIDTH LAYERS. Prints a line when it is
ready, and for each line that it reads the seconds of so many steps.
"""
import json
import pathlib
import re
import sys
import time

import torch

# torchvision without its compiled operators registers fakes for them at import; this declares the operators by name.
if not hasattr(torch.ops.torchvision, 'nms'):
  _library = torch.library.Library('torchvision', 'DEF')
  for _name in ('nms', 'qnms', 'roi_align', '_roi_align_backward', 'roi_pool', '_roi_pool_backward', 'ps_roi_align',
                '_ps_roi_align_backward', 'ps_roi_pool', '_ps_roi_pool_backward', 'deform_conv2d', '_deform_conv2d_backward'):
    _library.define(f'{_name}(Tensor x) -> Tensor')

TRUNKS = {'mobilenet_v2': 'mobilenetv2_100', 'resnet18': 'resnet18', 'vit_ti': 'vit_tiny_patch16_224'}


def main(tower, dtype, compiled, *numbers):
  """Makes the step, says how long its first call took, then serves."""
  batch, size, context, vocabulary, width, layers = map(int, numbers)
  import open_clip
  torch.manual_seed(0)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
  model = open_clip.CLIP(
      embed_dim=512, vision_cfg=dict(timm_model_name=TRUNKS[tower], timm_model_pretrained=False, timm_proj='linear',
                                     timm_pool='token' if tower == 'vit_ti' else 'avg', image_size=size),
      text_cfg=dict(context_length=context, vocab_size=vocabulary, width=width, heads=width // 64, layers=layers),
      output_dict=True).to(device, memory_format=torch.channels_last)
  plain = [p for n, p in model.named_parameters() if p.ndim < 2 or 'bn' in n or 'ln' in n or 'bias' in n or 'logit_scale' in n]
  known = set(map(id, plain))
  decayed = [p for p in model.parameters() if id(p) not in known]
  optimizer = torch.optim.AdamW(
      [dict(params=plain, weight_decay=0.0), dict(params=decayed, weight_decay=0.1)],
      lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
  images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
  texts = torch.randint(1, vocabulary - 1, (batch, context), device=device)
  texts[:, -1] = vocabulary - 1   # the end token is the largest id
  loss_of, called = open_clip.ClipLoss(), torch.compile(model) if compiled == '1' else model
  low = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')
  model.train()

  def step():
    optimizer.zero_grad()
    with low:
      loss = loss_of(**called(images, texts))
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      model.logit_scale.clamp_(0, 4.6052)
    return loss

  serve(step, device)


def serve(step, device):
  """The first step, then as many as each line says."""
  def timed(count):
    start = time.perf_counter()
    for _ in range(count):
      loss = float(step())
    assert loss == loss, 'the loss is not a number'
    return time.perf_counter() - start
  print(json.dumps(timed(1)), flush=True)
  for line in sys.stdin:
    print(json.dumps(timed(int(line))), flush=True)
  peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 1024 * int(
      re.search(r'VmHWM:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])
  print(json.dumps(peak), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
