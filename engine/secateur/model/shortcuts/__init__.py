"""Ways to compute the same outputs in fewer operations while a model scores. They use the model stage."""
