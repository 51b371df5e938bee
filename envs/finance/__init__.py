"""Markets: data with a manifest, tensor environments, walk-forward evaluation, metrics."""
