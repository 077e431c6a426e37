"""Text from a protected model: prompts, decoding, grammars, tool calls."""
