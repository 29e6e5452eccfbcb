"""Console scripts: Hydra mains and what they run."""
