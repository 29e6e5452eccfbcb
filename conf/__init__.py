"""The Hydra groups of the console scripts."""
