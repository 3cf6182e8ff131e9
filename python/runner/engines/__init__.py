"""How each engine shows what it computes. A file an engine; none is imported before it is used."""
