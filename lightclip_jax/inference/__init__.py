"""Reading trained towers back, without any training code."""
