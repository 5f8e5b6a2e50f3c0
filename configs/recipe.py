"""The recipe that all towers share: `get(variant, tower)` gives the config of one of the variants below.

quickstart  emoji, 2 CPU cores, minutes
emoji       emoji, one GPU (the default)
icons       the large icon set, one GPU
cc3m        CC3M, a v5e-8 or one GPU node
yfcc15m     YFCC15M, a v5e-256 pod
"""
