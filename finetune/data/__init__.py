"""From files to arrays: source, formats, template, tokenize, dataset, sampler, collate.

Each stage is a module that can be run alone; none of them imports paddle, so that faults in the
data are reported before any weight is read::

    file -> Record -> Conversation -> Piece... -> Sample -> global batch -> arrays
         readers   formats         template    tokenize  sampler         collate

`splits` decides which files and examples a run uses.
"""
