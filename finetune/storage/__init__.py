"""Files and their formats: what is on disk, without a word on what it is for."""
