"""From a graph to builds for hardware: quantisation, gates, and the derivation of the scoring graph. Needs no torch."""
