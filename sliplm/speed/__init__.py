"""How fast the protected model is beside the unprotected one: `slip bench`."""
