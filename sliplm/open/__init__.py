"""Open blocks: decoder blocks that are computed whole, in plain, by whoever holds their weights."""
