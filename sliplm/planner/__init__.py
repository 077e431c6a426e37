"""What a plan costs before it is split, and what a block is worth: `slip plan`, `slip sensitivity`, `auto:BUDGET`."""
