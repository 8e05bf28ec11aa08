"""A pair of rows of logits becomes a state, statistics, and the gradient of any loss of them."""
