"""What a run will be, told before it: parameters, layout, steps, memory, disk, time."""
