"""Native decoding: a static cache of keys and values, packed weights, continuous batching."""
