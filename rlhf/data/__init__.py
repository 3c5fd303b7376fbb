"""From rows on disk to batches: sources, split, mix, preparation, collation and loading."""
