"""The trusted side. Importing it teaches Transformers to load trusted bundles with `from_pretrained`."""

import sliplm.trusted.transformers  # noqa: F401
