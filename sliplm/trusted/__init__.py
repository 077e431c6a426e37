"""The trusted side. Importing it teaches Transformers to load trusted bundles with `from_pretrained`."""

from sliplm.trusted import quantizer as quantizer  # registers the quantization method "slip"
