"""Model families: one file each. Knows models, knows nothing of patterns and GPUs."""
