"""From the files of a run to one model: tensors are joined, changed and written one at a time. NumPy only."""
