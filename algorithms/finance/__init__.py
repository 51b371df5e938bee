"""Trading agents, chosen and judged walk-forward."""
