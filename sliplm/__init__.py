"""Run a model on hardware you do not trust, without giving its weights away (SLIP, arXiv 2407.10886)."""

__version__ = "0.1.0"
