"""Training: a loop that reads like prose, and one file for each concern."""
