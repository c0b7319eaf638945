"""Step 1: recipes, and the trainers that they describe."""
