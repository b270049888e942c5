"""Quantization of a pretrained policy, with training and without: `python -m experiments.qat`."""
