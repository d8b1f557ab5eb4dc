"""The hinge criteria at class level: sums over all triplets as weights of the scores."""
