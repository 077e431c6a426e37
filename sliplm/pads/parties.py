def may_use(makers: frozenset[str], edge: str | None) -> bool:
    return edge is None or edge not in makers
