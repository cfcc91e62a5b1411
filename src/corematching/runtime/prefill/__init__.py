"""One prefill: what policies are shown, and the tokens that go on."""
