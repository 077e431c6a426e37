"""The protocol's step: one masked, verified round trip."""
