"""Pictures of results, of training runs and of frequencies, one file for each."""
