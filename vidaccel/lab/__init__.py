"""The lab: what a model costs, measured (`model_bench`) or computed (`estimate`), and what a video lost (`quality`)."""
