"""Write one scale as a config that stock programs read."""
