"""Tensors on disk, whatever wrote them, without Paddle: one reader, one writer, one table of element types.

dtypes            element types: names, codes, NumPy's types, bfloat16 to and from float32
arrays            an array's place in a file, mapped, read in blocks or copied
safetensors_files the header of a safetensors file, checked and written
pickles           the unpickler that knows tensors only; pdparams_files, torch_files: the two kinds of file
joined_tensors    a tensor whose parts several ranks wrote (splits: how it was cut)
rank_files        names of the ranks' files, and which of them are there
checkpoints       a folder's tensors by name
output_file       a file that threads fill; writer: safetensors files of any size, planned and numbered
"""
