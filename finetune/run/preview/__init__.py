"""What a run would train on, shown before anything is loaded."""
