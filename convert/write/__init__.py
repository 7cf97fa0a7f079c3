"""Write converted folders."""
