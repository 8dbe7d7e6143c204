"""What came out: labelled arrays, statistics, figures. Needs no jax."""
