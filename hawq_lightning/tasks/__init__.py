"""LightningModules: classification, detection."""
