"""The processes of a run, on one machine or many: how they start, come together, stop and end. Nothing is computed."""
