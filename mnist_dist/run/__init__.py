"""What a run keeps and shows: its state, checkpoints, directory, metrics and progress."""
