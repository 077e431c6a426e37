"""The protected model as a model that vLLM serves (docs/serving.md)."""
