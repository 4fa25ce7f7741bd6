"""One short driver per training method, and the configurations that they run."""
