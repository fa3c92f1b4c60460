"""A network in integers: traced (`tracing`, `rules`), folded (`fold`), run (`operations`), written (`files`)."""
