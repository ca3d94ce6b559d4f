"""What can be set: one record per setting, from which parsing, checks, help, resume and the tables in docs follow.

`model` and `data` hold the records of our own settings, `training` what we say about PaddleNLP's (whose names,
types and defaults are data, recorded by ``tools/record_training_arguments.py``), `foreign` the settings of
PaddleNLP's scripts that have no place here. Nothing imports paddle: help and every argument error answer at once.
"""
