"""The on-disk facts of a RecIS directory: safetensors headers, slices, names, indexes. Pure; imports errors only."""
