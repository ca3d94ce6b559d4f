"""What can be set: one record per setting, from which parsing, checks, help, resume and the pages in docs follow.

`model` and `data` hold the records of our own settings; those of PaddleNLP's settings are JSON files, which
`registry` reads. Nothing here imports paddle: help and every argument error answer at once.
"""
