"""Measurements beside named peers, as ratios in one run."""
