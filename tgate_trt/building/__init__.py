"""Building a bundle: request, graphs, verification, engines, staleness."""
