"""Training the adapters: one path for warm-up, trials, the final run and every baseline."""
