"""A page in the browser on which a training is put together, started, watched and tried out."""
