"""What a run leaves on the disk: its folder, what it measured, and its checkpoints."""
