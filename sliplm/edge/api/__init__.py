"""The API on the customer's machine: OpenAI's, for one model and plain text, with a chat page and metrics.

Source of the formats: OpenAI's API reference (Chat, Completions, Models, Errors), and what its Python client reads.
"""

from sliplm.edge.api.app import create_app

__all__ = ["create_app"]
