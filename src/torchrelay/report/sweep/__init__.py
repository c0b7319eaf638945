"""A sweep: many runs of a recipe that differ in a few keys; the promising ones are trained on."""
