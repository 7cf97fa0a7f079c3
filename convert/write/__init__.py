"""Writing converted folders."""
