"""What `doctor` says about a model."""
