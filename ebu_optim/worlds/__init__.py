"""Small worlds in which everything runs on a laptop: data, models, judges."""
