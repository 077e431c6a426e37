"""The split of a checkpoint into its two halves. `sliplm.split(model, out, ...)` is `sliplm.split.split.split`."""

from sliplm._callable import callable_module

callable_module(__name__, "sliplm.split.split", "split")
