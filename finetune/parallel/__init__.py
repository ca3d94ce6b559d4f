"""Training on several processes: layouts, process groups, pipelines, sharding."""
