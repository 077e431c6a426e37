"""Attacks on a copied edge bundle, one file each, with its threat model, its source and what the thief is given."""
