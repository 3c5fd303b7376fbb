"""Pure tensor functions: tensors and floats in, tensors out; no configuration, no state."""
