"""Starting values of steps from data: `steps` for a whole layer, `ladder` for the search of ADC steps and offsets."""
