"""Folders that a run continues from: whole tensors whatever the layout, and a manifest."""
