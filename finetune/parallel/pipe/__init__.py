"""Pipeline parallelism for every family: stages cut from the family's own model, and their schedule."""
