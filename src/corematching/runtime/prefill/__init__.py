"""One prefill: the views for policies, and the token and neuron choices."""
