"""A stock model with a scaling in the place of its ropes."""
