"""One study a notebook, of the same name without its number."""
