"""Which layers get adapters: masks, layer scores, policies. Only ``masks.tuning`` needs torch."""
