"""What a run is asked for: options in a config path, files, and the fields with their meanings."""
