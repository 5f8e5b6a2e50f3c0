"""What a step will cost on hardware that is not there: compiled ahead of time, read, and compared with a chip."""
