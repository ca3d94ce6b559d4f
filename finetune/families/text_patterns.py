"""Regular expressions that cut text into words before byte-level merging, as the families were trained with."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's and Qwen 2's: one digit in a word."""

LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""Llama 3's: up to three digits."""

BLOOM_PATTERN = r" ?[^(\s|[.,!?…。，、।۔،])]+"
"""BLOOM's: whatever stands between blanks and marks."""
