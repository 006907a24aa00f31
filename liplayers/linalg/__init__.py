"""Pure functions on tensors, batched over leading dimensions: no modules, no state."""
