"""One scale, in words of stock programs."""
